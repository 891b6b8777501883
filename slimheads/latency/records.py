"""The records of a latency measurement: times, intervals, verdicts, as in report.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slimheads.runtime.environment import Conditions

Verdict = Literal["faster", "slower", "no difference shown", "inconclusive", "not measured"]


class Timing(BaseModel):
    """Wall-clock times of one session's runs, in milliseconds."""

    model_config = ConfigDict(frozen=True)
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    tokens_per_second: float | None = None  # decoders: new tokens of all sequences over the median


class Interval(BaseModel):
    """A ratio of medians with its 95% interval for a repeat (no unit; above 1 means the second is faster)."""

    model_config = ConfigDict(frozen=True)
    estimate: float
    low: float
    high: float


class Samples(BaseModel):
    """All samples in order, in milliseconds per run: one row per session set, one column per round."""

    model_config = ConfigDict(frozen=True)
    dense: tuple[tuple[float, ...], ...]
    slim: tuple[tuple[float, ...], ...]
    control: tuple[tuple[float, ...], ...]


class CacheBytes(BaseModel):
    """Bytes by which a decoder's KV cache grows with each token of a sequence, in all layers together."""

    model_config = ConfigDict(frozen=True)
    dense: int
    slim: int


class Placement(BaseModel):
    """How many operators of each file run on which provider of ONNX Runtime."""

    model_config = ConfigDict(frozen=True)
    dense: dict[str, int]
    slim: dict[str, int]


class Latency(BaseModel):
    """One measurement: one provider, thread count, precision and shape."""

    model_config = ConfigDict(frozen=True)
    provider: str
    threads: int
    graph: str | None = None  # which file, where a model has more than one: "encoder_model"
    precision: str
    candidate: str = "plain"  # which form of the float32 graph
    ships: bool | None = None  # in a run: whether the slim file is one of those that ship
    shape: tuple[int, ...]
    dense: Timing | None = None
    slim: Timing | None = None
    speedup: Interval | None = None
    control: Interval | None = None  # dense against a second dense session in the same interleaving
    flop_speedup: float | None = None
    realised: float | None = None  # speedup.estimate / flop_speedup
    verdict: Verdict
    reason: str | None = None  # why nothing was measured, or why it is inconclusive
    cache_bytes_per_token: CacheBytes | None = None  # decoders only
    placement: Placement | None = None  # null on the CPU provider, which runs every operator
    conditions: Conditions | None = None  # null where nothing was measured
    samples: Samples | None = Field(default=None, exclude=True, repr=False)  # for plots; not in report.json

    @property
    def phase(self) -> Literal["prefill", "decode"] | None:
        """Decode is one new token after cached ones, prefill anything else; None of models that are no decoders."""
        if self.cache_bytes_per_token is None:
            return None
        return "decode" if len(self.shape) > 2 and self.shape[1] == 1 and self.shape[2] > 0 else "prefill"
