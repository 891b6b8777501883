"""What pruning does and what a treatment of the graph does (a fusion, a precision), told apart in one measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slimheads.latency.bench import Setup, effort_of, measured_rows
from slimheads.latency.records import Interval, Latency, Verdict
from slimheads.latency.sampling import Floats, Series
from slimheads.latency.statistics import judge, ratio_interval
from slimheads.names import OnMissing, Shape

EFFORT = 5 / 3  # times what `bench` takes: five sessions instead of three


class Ratio(BaseModel):
    """How much faster the second of two files is than the first, and whether that can be believed."""

    model_config = ConfigDict(frozen=True)
    interval: Interval
    verdict: Verdict
    reason: str | None = None


class TreatedLatency(BaseModel):
    """What pruning and a treatment of the graph (a fusion, a precision) each do at one shape, measured in one go.

    The ratios are null where nothing was measured; `latency.reason` says why.
    """

    model_config = ConfigDict(frozen=True)
    latency: Latency  # treated dense against treated slim, as `bench` gives it: what pruning does to treated graphs
    on_dense: Ratio | None = None  # plain dense / treated dense: what the treatment does to the dense model
    on_slim: Ratio | None = None  # plain slim / treated slim
    whole: Ratio | None = None  # plain dense / treated slim: pruning and treatment together


def bench_treated(
    dense: str | Path,
    slim: str | Path,
    dense_treated: str | Path,
    slim_treated: str | Path,
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
) -> tuple[TreatedLatency, ...]:
    """Measure two models and two treated graphs of them (fused, quantized) in the same rounds, to tell apart what
    pruning gives, what the treatment gives, and what both give together.

    Args:
        dense, slim: the plain files.
        dense_treated, slim_treated: the treated ones. The control is a second session of `dense_treated`.
        precision, graph: labels for the report, of the treated files.
        min_seconds: as `bench` takes it; a shape takes five thirds of it, so that each file runs as often as there.
        shapes, provider, threads, min_pairs, flops, on_missing, seed, on_progress, on_share: as `bench` takes them.

    Returns, raises: as `bench`.
    """
    effort = effort_of(min_seconds * EFFORT, min_pairs)
    setup = Setup(provider, threads, precision, graph, flops or {}, on_missing, seed)
    files = (Path(dense_treated), Path(slim_treated), Path(dense), Path(slim))
    found = measured_rows(files, shapes, setup, effort, on_progress, on_share)
    return tuple(_treated(row, series, seed) for row, series in found)


def _treated(row: Latency, series: Series | None, seed: int) -> TreatedLatency:
    if series is None or row.control is None:
        return TreatedLatency(latency=row)
    dense_treated, slim_treated, dense, slim = (series.samples(role) for role in range(4))
    control = row.control

    def ratio(before: Floats, after: Floats) -> Ratio:
        interval = ratio_interval(before, after, seed)
        verdict, reason = judge(interval, control)
        return Ratio(interval=interval, verdict=verdict, reason=reason)

    return TreatedLatency(
        latency=row,
        on_dense=ratio(dense, dense_treated),
        on_slim=ratio(slim, slim_treated),
        whole=ratio(dense, slim_treated),
    )
