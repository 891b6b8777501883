"""Latency: dense against slim in ONNX Runtime, in interleaved pairs, with a control and an interval."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["faster", "slower", "no difference shown", "inconclusive", "not measured"]


class Timing(BaseModel):
    """Wall-clock times of one session's runs, in milliseconds."""

    model_config = ConfigDict(frozen=True)
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


class Interval(BaseModel):
    """A ratio of medians with its 95% bootstrap interval (no unit; above 1 means the second is faster)."""

    model_config = ConfigDict(frozen=True)
    estimate: float
    low: float
    high: float


class Latency(BaseModel):
    """One measurement: one provider, thread count, precision and shape."""

    model_config = ConfigDict(frozen=True)
    provider: str
    threads: int
    precision: str
    shape: tuple[int, ...]
    dense: Timing | None = None
    slim: Timing | None = None
    speedup: Interval | None = None
    control: Interval | None = None  # dense against a second dense session in the same interleaving
    flop_speedup: float | None = None
    realised: float | None = None  # speedup.estimate / flop_speedup
    verdict: Verdict
    reason: str | None = None  # why nothing was measured, or why it is inconclusive
