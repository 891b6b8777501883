"""How much of a speedup comes from deleting heads, and how much from another graph or precision.

A treatment, as report.json calls it, is what is done to the exported graphs besides deleting heads: another form of the
float32 graph, or a precision. Dense and slim graph get the same treatment, and all four graphs run in the same rounds,
so that one measurement gives both ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimheads.exporting.graph_files import graph_bytes
from slimheads.formatting import size
from slimheads.latency.bench import Setup, effort_of, measured_rows
from slimheads.latency.records import Interval, Latency, Verdict
from slimheads.latency.sampling import Floats, Series
from slimheads.latency.statistics import judge, ratio_interval
from slimheads.names import OnMissing, Shape
from slimheads.runtime.memory import available_bytes

TreatmentKind = Literal["candidate", "precision"]

EFFORT = 5 / 3  # times what `bench` takes: five sessions instead of three


class Ratio(BaseModel):
    """How much faster the second of two files is than the first, with a verdict."""

    model_config = ConfigDict(frozen=True)
    interval: Interval
    verdict: Verdict
    reason: str | None = None


class Attribution(BaseModel):
    """The gains of pruning and of a treatment at one shape, from the same rounds.

    The ratios are null where nothing was measured; `latency.reason` says why.
    """

    model_config = ConfigDict(frozen=True)
    latency: Latency  # treated dense against treated slim, as `bench` gives it: the gain of pruning
    on_dense: Ratio | None = None  # plain dense / treated dense: the gain of the treatment on the dense model
    on_slim: Ratio | None = None  # plain slim / treated slim
    whole: Ratio | None = None  # plain dense / treated slim: pruning and treatment together


class Treatment(BaseModel):
    """One treatment at one shape: ratios of medians, above 1 is faster. Null with a reason where not measured."""

    model_config = ConfigDict(frozen=True)
    treatment: str  # fused, int8, ...
    kind: TreatmentKind
    provider: str
    threads: int
    graph: str | None  # which file, where a model has more than one
    shape: tuple[int, ...]
    deletion: Interval | None  # treated dense against treated slim
    on_dense: Interval | None  # plain dense against treated dense
    on_slim: Interval | None  # plain slim against treated slim
    whole: Interval | None  # plain dense, which is what optimum exports, against treated slim
    verdict: Verdict  # on `on_slim`: the gain of the treatment on the slim model
    reason: str | None = None


def attribute(
    dense: str | Path,
    slim: str | Path,
    treated_dense: str | Path,
    treated_slim: str | Path,
    *,
    shapes: Sequence[Shape],
    provider: str = "cpu",
    threads: int = 2,
    precision: str = "fp32",
    graph: str | None = None,
    min_seconds: float = 3.0,
    min_pairs: int = 30,
    flops: Mapping[Shape, tuple[float, float]] | None = None,
    on_missing: OnMissing = "fail",
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
    on_share: Callable[[float], None] | None = None,
) -> tuple[Attribution, ...]:
    """Measures two models and two treated graphs of them (fused, quantized) in the same rounds.

    Args:
        dense, slim: the plain files.
        treated_dense, treated_slim: the treated ones. The control is a second session of `treated_dense`.
        precision, graph: labels of the treated files, for the report.
        min_seconds: as for `bench`; a shape takes five thirds of it, so that each file runs as often as there.
        shapes, provider, threads, min_pairs, flops, on_missing, seed, on_progress, on_share: as for `bench`.

    Returns, raises: as `bench`.
    """
    effort = effort_of(min_seconds * EFFORT, min_pairs)
    setup = Setup(provider, threads, precision, graph, flops or {}, on_missing, seed)
    files = (Path(treated_dense), Path(treated_slim), Path(dense), Path(slim))
    found = measured_rows(files, shapes, setup, effort, on_progress, on_share)
    return tuple(_attribution(row, series, seed) for row, series in found)


def _attribution(row: Latency, series: Series | None, seed: int) -> Attribution:
    if series is None or row.control is None:
        return Attribution(latency=row)
    treated_dense, treated_slim, dense, slim = (series.samples(role) for role in range(4))
    control = row.control

    def ratio(before: Floats, after: Floats) -> Ratio:
        interval = ratio_interval(before, after, seed)
        verdict, reason = judge(interval, control)
        return Ratio(interval=interval, verdict=verdict, reason=reason)

    return Attribution(
        latency=row,
        on_dense=ratio(dense, treated_dense),
        on_slim=ratio(slim, treated_slim),
        whole=ratio(dense, treated_slim),
    )


def treatment_of(found: Attribution, treatment: str, kind: TreatmentKind) -> Treatment:
    """The ratios of a measurement as a row of the report."""
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
    """Why memory is too small to open these files at once, the first one twice, or None where it is not.

    ONNX Runtime keeps the weights as it reads them and, for matrix products, also packed for the CPU.
    """
    needed = 2 * sum(map(graph_bytes, (*files, files[0])))
    free = available_bytes()
    if needed <= free:
        return None
    return f"five sessions of this model need about {size(needed)} of memory, and {size(free)} are free"


def unmeasured(row: Latency, treatment: str, kind: TreatmentKind, reason: str) -> Treatment:
    """A treatment where only the gain of the deletion was measured."""
    found = treatment_of(Attribution(latency=row), treatment, kind)
    return found.model_copy(update={"verdict": "not measured", "reason": reason})
