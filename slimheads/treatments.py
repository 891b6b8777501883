"""What of a speedup came from deleting heads, what from another graph or precision, and which graph ships.

A treatment is what is done to the exported graph beside deleting heads: a candidate (another float32 graph of the same
model) or a precision. Dense and slim get the same one, and all four graphs, dense and slim, plain and treated, run in
the same rounds: what the treatment gave and what the deletion gave are read off one measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimheads.bench import Interval, Verdict

PLAIN = "plain"
MIN_GAIN = 1.01  # less than one percent is not worth another graph than the one every tool knows


class Treatment(BaseModel):
    """One treatment at one shape: ratios of medians, above 1 is faster. Null with a reason where not measured."""

    model_config = ConfigDict(frozen=True)
    treatment: str  # fused, int8, ...
    kind: Literal["candidate", "precision"]
    provider: str
    threads: int
    graph: str | None  # which file's, where a model is more than one
    shape: tuple[int, ...]
    deletion: Interval | None  # treated dense against treated slim
    on_dense: Interval | None  # plain dense against treated dense
    on_slim: Interval | None  # plain slim against treated slim
    whole: Interval | None  # plain dense, which is what optimum exports, against treated slim
    verdict: Verdict  # on `on_slim`: what the treatment gives the model that ships
    reason: str | None = None


class Candidate(BaseModel):
    """One float32 graph that could ship: whether it was made, proven and chosen, and why not."""

    model_config = ConfigDict(frozen=True)
    candidate: str
    built: bool
    proven: bool | None  # null: there was nothing to prove
    ships: bool
    reason: str | None = None  # why it does not ship, or why it does


def choose(rows: Sequence[Treatment]) -> tuple[str, dict[str, str]]:
    """The candidate that ships, and in words why each other one does not.

    The plain graph ships unless another one is shown to be faster at some shape, is shown to be slower at none, and
    gains at least MIN_GAIN over all of them (geometric mean): a choice that changed with the noise of the machine would
    ship another file on every run.

    Args:
        rows: of the provider that decides; those of precisions are passed over.
    """
    gains: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(row.treatment for row in rows if row.kind == "candidate"):
        own = [row for row in rows if row.treatment == name]
        fault = next((row.reason for row in own if row.on_slim is None), None)
        measured = [row.on_slim.estimate for row in own if row.on_slim]
        if len(measured) < len(own):
            reasons[name] = f"not measured: {fault}"
            continue
        gain = exp(sum(map(log, measured)) / len(measured))
        reasons[name] = f"{gain:.3f}x the plain graph's speed over {len(own)} shape{'s' if len(own) > 1 else ''}"
        verdicts = {row.verdict for row in own}
        if unclear := next((row.reason for row in own if row.verdict == "inconclusive"), None):
            reasons[name] += f", inconclusive: {unclear}"
        elif "slower" in verdicts:
            reasons[name] += ", and slower at one of them"
        elif "faster" not in verdicts:
            reasons[name] += ", which is not shown to be faster"
        elif gain < MIN_GAIN:
            reasons[name] += f", less than the {MIN_GAIN - 1:.0%} that another graph must gain"
        else:
            gains[name] = gain
    best = max(gains, key=lambda name: gains[name], default=PLAIN)
    return best, reasons
