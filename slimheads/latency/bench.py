"""Latency: dense against slim in ONNX Runtime, in interleaved rounds, with a control, an interval and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

from slimheads.errors import EnvironmentLackError, UsageError, require_known
from slimheads.families.config_facts import without_length
from slimheads.latency.records import CacheBytes, Latency, Placement, Samples
from slimheads.latency.sampling import Effort, Series, measure
from slimheads.latency.statistics import control_fault, judge, ratio_interval, timing
from slimheads.names import OnMissing, Shape
from slimheads.runtime.environment import Conditions, Watch
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import PROVIDERS, open_session, placement_of, require_provider

EXTENSION = 3  # with a noisy control, up to this many times the seconds and session sets


def bench(
    dense: str | Path,
    slim: str | Path,
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
) -> tuple[Latency, ...]:
    """Measures how much faster `slim` runs than `dense`: any two ONNX files that take a transformer's inputs.

    Args:
        dense: the file to compare against; it is measured twice, the second time as the control.
        slim: the file to compare.
        shapes: per measurement (batch, length), (batch, length, past) or, for the decoder of an encoder-decoder,
            (batch, length, past, encoder positions); (batch,) where inputs have no length. The cache holds `past`
            tokens that the same file has read.
        provider: `cpu` or `cuda`.
        threads: threads within an operator.
        precision, graph: labels for the report.
        min_seconds: least time in timed runs per shape; up to three times as much where the control is noisy.
        min_pairs: least number of rounds per shape.
        flops: floating-point operations of (dense, slim) by shape, where known.
        on_missing: with "skip", a missing provider gives rows with the verdict "not measured".
        seed: of the inputs, the orders and the bootstrap.
        on_progress: called with one line of text after each session set of a shape.
        on_share: called along with it, with the share of the measurement that is done, 0 to 1. It falls where the
            control asks for more.

    Returns:
        One row per shape, in the order of `shapes`; where inputs have no length, one row per batch size.

    Raises:
        UsageError: a file cannot be opened or fed, or does not run at a shape.
        EnvironmentLackError: the provider is missing or runs nothing of a file, and `on_missing` is "fail".
    """
    effort = effort_of(min_seconds, min_pairs)
    require_known("bench.on_missing", on_missing, ("fail", "skip"))
    setup = Setup(provider, threads, precision, graph, flops or {}, on_missing, seed)
    found = measured_rows((Path(dense), Path(slim)), shapes, setup, effort, on_progress, on_share)
    return tuple(row for row, _ in found)


@dataclass(frozen=True)
class Setup:
    """What all rows of one measurement share."""

    provider: str
    threads: int
    precision: str
    graph: str | None
    flops: Mapping[Shape, tuple[float, float]]
    on_missing: OnMissing
    seed: int


def effort_of(min_seconds: float, min_pairs: int) -> Effort:
    """How long to measure.

    Raises:
        UsageError: no time or no pairs.
    """
    if not 0 < min_seconds < inf or min_pairs < 1:
        raise UsageError(
            f"min_seconds {min_seconds} with min_pairs {min_pairs} measures nothing",
            where="bench",
            hint="give a positive time and at least one pair",
        )
    return Effort(min_seconds, min_pairs, EXTENSION)


def measured_rows(
    files: Sequence[Path],
    shapes: Sequence[Shape],
    setup: Setup,
    effort: Effort,
    on_progress: Callable[[str], None] | None,
    on_share: Callable[[float], None] | None,
) -> list[tuple[Latency, Series | None]]:
    """One row per shape about the first two files, and the samples of all files where any were measured.

    Args, raises: as `bench`.
    """
    shapes = tuple(tuple(shape) for shape in shapes)
    ratios = {shape: dense / slim for shape, (dense, slim) in setup.flops.items()}
    labels = {name: getattr(setup, name) for name in ("provider", "threads", "precision", "graph")}

    def row(shape: Shape) -> partial[Latency]:
        return partial(Latency, **labels, shape=shape, flop_speedup=ratios.get(shape))

    watch = Watch()
    try:
        require_provider(setup.provider)
        interfaces = [read_interface(file) for file in files[:2]]
        if not interfaces[0].has_length:
            shapes = without_length(shapes)
        placement = _placement(files, setup)
        series = measure(
            files,
            shapes,
            effort,
            provider=setup.provider,
            threads=setup.threads,
            control_ok=lambda first, control: control_fault(ratio_interval(first, control, setup.seed)) is None,
            seed=setup.seed,
            on_progress=on_progress or (lambda line: None),
            on_share=on_share or (lambda share: None),
        )
    except EnvironmentLackError as error:
        if setup.on_missing == "fail":
            raise
        return [(row(shape)(verdict="not measured", reason=str(error)), None) for shape in shapes]
    dense_cache, slim_cache = (interface.cache_bytes_per_token for interface in interfaces)
    cache = None if dense_cache is None or slim_cache is None else CacheBytes(dense=dense_cache, slim=slim_cache)
    made = partial(_result, placement=placement, cache=cache, conditions=watch.conditions(), seed=setup.seed)
    return [(made(row(shape), series[shape], shape), series[shape]) for shape in shapes]


def _placement(files: Sequence[Path], setup: Setup) -> Placement | None:
    """Where the operators of the first two files run; None on the CPU provider, which runs all of them.

    Raises:
        EnvironmentLackError: the provider runs no operator of a file: ONNX Runtime would run it on the CPU.
    """
    wanted = PROVIDERS[setup.provider]
    if wanted == PROVIDERS["cpu"]:
        return None
    found = []
    for file in files:
        found.append(placement_of(open_session(file, setup.provider, setup.threads, placement=True)))
        if not found[-1].get(wanted):
            raise EnvironmentLackError(
                f"{wanted} runs no operator of the file",
                where=str(file),
                keys=("bench.providers",),
                hint="measure it with provider cpu",
            )
    return Placement(dense=found[0], slim=found[1])


def _result(
    row: Callable[..., Latency],
    series: Series,
    shape: Shape,
    *,
    placement: Placement | None,
    cache: CacheBytes | None,
    conditions: Conditions,
    seed: int,
) -> Latency:
    dense, slim, control = (series.samples(role) for role in (0, 1, -1))
    speedup, dense_twice = ratio_interval(dense, slim, seed), ratio_interval(dense, control, seed)
    verdict, reason = judge(speedup, dense_twice)
    tokens = shape[0] * shape[1] if cache else None
    made = row(
        dense=timing(dense, series.repeats, tokens),
        slim=timing(slim, series.repeats, tokens),
        speedup=speedup,
        control=dense_twice,
        verdict=verdict,
        reason=reason,
        cache_bytes_per_token=cache,
        placement=placement,
        conditions=conditions,
        samples=Samples(dense=dense.tolist(), slim=slim.tolist(), control=control.tolist()),
    )
    if made.flop_speedup is None:
        return made
    return made.model_copy(update={"realised": speedup.estimate / made.flop_speedup})
