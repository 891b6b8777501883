"""What of a speedup came from deleting heads, what from another graph or precision, and which graph ships.

A treatment is what is done to the exported graph beside deleting heads: a candidate (another float32 graph of the same
model) or a precision. Dense and slim get the same one, and all four graphs, dense and slim, plain and treated, run in
the same rounds: what the treatment gave and what the deletion gave are read off one measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimheads.exporting.graph_files import graph_bytes
from slimheads.formatting import size
from slimheads.latency.attribution import TreatedLatency
from slimheads.latency.records import Interval, Latency, Verdict
from slimheads.names import PLAIN, GraphForm
from slimheads.runtime.memory import available_bytes

Kind = Literal["candidate", "precision"]
MIN_GAIN = 1.01  # less than one percent is not worth another graph than the one every tool knows


class Treatment(BaseModel):
    """One treatment at one shape: ratios of medians, above 1 is faster. Null with a reason where not measured."""

    model_config = ConfigDict(frozen=True)
    treatment: str  # fused, int8, ...
    kind: Kind
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


def treatment_of(found: TreatedLatency, treatment: str, kind: Kind) -> Treatment:
    """What a measurement says of the treatment itself."""
    row = found.latency
    verdict, reason = (found.on_slim.verdict, found.on_slim.reason) if found.on_slim else (row.verdict, row.reason)
    ratios = {
        name: ratio.interval if ratio else None
        for name, ratio in (("on_dense", found.on_dense), ("on_slim", found.on_slim), ("whole", found.whole))
    }
    return Treatment(
        treatment=treatment,
        kind=kind,
        provider=row.provider,
        threads=row.threads,
        graph=row.graph,
        shape=row.shape,
        deletion=row.speedup,
        verdict=verdict,
        reason=reason,
        **ratios,
    )


def lacking_memory(files: Sequence[Path]) -> str | None:
    """Why these files cannot all be open at once, the first one twice, or None where they can.

    ONNX Runtime keeps the weights as they are read and, for matrix products, packed for the CPU besides.
    """
    needed = 2 * sum(map(graph_bytes, (*files, files[0])))
    free = available_bytes()
    if needed <= free:
        return None
    return f"five sessions of this model need about {size(needed)} of memory, and {size(free)} are free"


def unmeasured(row: Latency, treatment: str, kind: Kind, reason: str) -> Treatment:
    """A treatment of which only the deletion was measured."""
    found = treatment_of(TreatedLatency(latency=row), treatment, kind)
    return found.model_copy(update={"verdict": "not measured", "reason": reason})


class GraphChoice(BaseModel):
    """One float32 graph that could ship: whether it was made, proven and chosen, and why not."""

    model_config = ConfigDict(frozen=True)
    candidate: GraphForm
    built: bool
    proven: bool | None  # null: there was nothing to prove
    ships: bool
    reason: str | None = None  # why it does not ship, or why it does


def choices(
    built: Mapping[GraphForm, str | None],
    refused: Mapping[GraphForm, str | None] | None,
    rows: Sequence[Treatment],
    again: Sequence[Treatment] = (),
) -> tuple[GraphChoice, ...]:
    """Every float32 graph with its fate; exactly one ships, or none where the model's own proof failed.

    Args:
        built: the candidates asked for besides the plain graph, each with the reason where it was not made.
        refused: those that were made, each with the reason where the certificate refused it; None where the links of
            the plain graph did not all hold, for no other graph is tried then.
        rows: what was measured of those that were proven, on the provider that decides.
        again: of the one that ships, measured anew once it was chosen.
    """
    if refused is None:
        plain = GraphChoice(candidate=PLAIN, built=True, proven=False, ships=False, reason="the certificate failed")
        untried = "not tried, since the certificate had failed"
        return plain, *(
            GraphChoice(candidate=name, built=not fault, proven=None, ships=False, reason=fault or untried)
            for name, fault in built.items()
        )
    ships, reasons = choose(rows)
    if (afresh := _gain(again)) is not None:
        reasons[ships] += f" when it was chosen, {afresh:.3f}x when measured again"
    gone = f"{ships} ships, {reasons[ships]}" if ships != PLAIN else "no other graph is shown to be faster"
    found = [GraphChoice(candidate=PLAIN, built=True, proven=True, ships=ships == PLAIN, reason=gone)]
    for name, fault in built.items():
        proven = None if fault else refused[name] is None
        reason = fault or refused[name] or reasons.get(name, "not measured")
        found.append(GraphChoice(candidate=name, built=not fault, proven=proven, ships=name == ships, reason=reason))
    return tuple(found)


def choose(rows: Sequence[Treatment]) -> tuple[str, dict[str, str]]:
    """The candidate that ships, and how each other one than the plain graph fared, in words.

    The plain graph ships unless another one is conclusively faster at some shape, slower at none, and gains at least
    MIN_GAIN over all of them (geometric mean): a choice that changed with the noise of the machine would ship another
    file on every run.

    Args:
        rows: of one provider; those of precisions are passed over.
    """
    gains: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(row.treatment for row in rows if row.kind == "candidate"):
        own = [row for row in rows if row.treatment == name]
        if (gain := _gain(own)) is None:
            reasons[name] = next(f"not measured: {row.reason}" for row in own if row.on_slim is None)
            continue
        reasons[name] = f"{gain:.3f}x the plain graph's speed"
        verdicts = {row.verdict for row in own}
        if "inconclusive" in verdicts:
            reasons[name] += ", inconclusive"
        elif "slower" in verdicts:
            reasons[name] += ", slower at one shape at least"
        elif "faster" not in verdicts:
            reasons[name] += ", which could be noise"
        elif gain < MIN_GAIN:
            reasons[name] += f", less than the {MIN_GAIN:.2f}x that another graph must reach"
        else:
            gains[name] = gain
    return max(gains, key=lambda name: gains[name], default=PLAIN), reasons


def _gain(rows: Sequence[Treatment]) -> float | None:
    """The geometric mean of what a treatment gave the slim model; None where some of it was not measured."""
    measured = [row.on_slim.estimate for row in rows if row.on_slim]
    return exp(sum(map(log, measured)) / len(measured)) if measured and len(measured) == len(rows) else None
