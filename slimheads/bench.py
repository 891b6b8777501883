"""Latency: dense against slim in ONNX Runtime, in interleaved rounds, with a control, an interval and a verdict.

How samples are taken is said in measuring.py; this module says what they are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from slimheads.binding import Shape
from slimheads.environment import Conditions, Watch
from slimheads.errors import EnvironmentLackError, UsageError, require_known
from slimheads.inputs import without_length
from slimheads.interface import read_interface
from slimheads.measuring import Effort, Floats, Series, measure
from slimheads.sessions import PROVIDERS, open_session, placement_of, require_provider

Verdict = Literal["faster", "slower", "no difference shown", "inconclusive", "not measured"]

EXTENSION = 3  # a measurement is prolonged at most to so many times its seconds and session sets
CONTROL_WIDTH = 0.14  # a control interval wider than this cannot vouch for anything: 0.10 for the ratio itself
RESAMPLES = 9999


class Timing(BaseModel):
    """Wall-clock times of one session's runs, in milliseconds."""

    model_config = ConfigDict(frozen=True)
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    tokens_per_second: float | None = None  # of decoders: new tokens of all sequences over the median


class Interval(BaseModel):
    """A ratio of medians with its 95% interval for a repeat (no unit; above 1 means the second is faster)."""

    model_config = ConfigDict(frozen=True)
    estimate: float
    low: float
    high: float


class Samples(BaseModel):
    """Every sample in the order it was taken, in milliseconds a run: a row a session set, a column a round."""

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
    graph: str | None = None  # which file's, where a model is more than one: "encoder_model"
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
    placement: Placement | None = None  # null on the CPU, where all of it runs there
    conditions: Conditions | None = None  # null where nothing was measured
    samples: Samples | None = Field(default=None, exclude=True, repr=False)  # for plots; report.json goes without

    @property
    def phase(self) -> Literal["prefill", "decode"] | None:
        """What a decoder does at this shape: one token after others, or more; None of other models."""
        if self.cache_bytes_per_token is None:
            return None
        return "decode" if len(self.shape) > 2 and self.shape[1] == 1 and self.shape[2] > 0 else "prefill"


# ----------------------------------------------------------------------------------------------------- public function


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
    on_missing: Literal["fail", "skip"] = "fail",
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[Latency, ...]:
    """Measure how much faster `slim` runs than `dense`: any two ONNX files that take a transformer's inputs.

    Args:
        dense: the file to compare against; it is measured twice, the second time as the control.
        slim: the file in question.
        shapes: (batch, length), (batch, length, past) or, for the decoder behind an encoder, (batch, length, past,
            encoder's positions) of each measurement; (batch,) where inputs have no length. The cache holds `past`
            tokens that the file itself has read.
        provider: `cpu` or `cuda`.
        threads: threads within an operator.
        precision, graph: labels for the report.
        min_seconds: least time in timed runs, a shape; up to three times as much where the control asks for it.
        min_pairs: least number of rounds, a shape.
        flops: floating-point operations of (dense, slim) by shape, where they are known.
        on_missing: `skip` answers a missing provider with rows that say "not measured".
        seed: of the inputs, the orders and the bootstrap.
        on_progress: called with one line of text after each session set of a shape.

    Returns:
        One row a shape, in the order of `shapes`; where the files' inputs have no length, one row a batch size.

    Raises:
        UsageError: a file cannot be opened or fed, or does not run at a shape.
        EnvironmentLackError: the provider is missing or runs nothing of a file, and `on_missing` is "fail".
    """
    effort = effort_of(min_seconds, min_pairs)
    require_known("bench.on_missing", on_missing, ("fail", "skip"))
    setup = Setup(provider, threads, precision, graph, flops or {}, on_missing, seed)
    found = measured_rows((Path(dense), Path(slim)), shapes, setup, effort, on_progress)
    return tuple(row for row, _ in found)


# ----------------------------------------------------------------------------------------------- from samples to a row


@dataclass(frozen=True)
class Setup:
    """What all rows of one measurement share."""

    provider: str
    threads: int
    precision: str
    graph: str | None
    flops: Mapping[Shape, tuple[float, float]]
    on_missing: Literal["fail", "skip"]
    seed: int


def effort_of(min_seconds: float, min_pairs: int) -> Effort:
    """How long to measure for; refuses what measures nothing."""
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
) -> list[tuple[Latency, Series | None]]:
    """A row a shape about the first two files, and the samples of all of them; no samples where nothing was measured.

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
            vouched=lambda first, control: control_fault(ratio_interval(first, control, setup.seed)) is None,
            seed=setup.seed,
            on_progress=on_progress or (lambda line: None),
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
    """Where the operators of the first two files run; on the CPU provider there is no other place.

    Raises:
        EnvironmentLackError: the provider runs nothing of a file, which would be measured on the CPU instead.
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


# ---------------------------------------------------------------------------------------------------------- statistics


def timing(samples: Floats, repeats: int = 1, tokens: int | None = None) -> Timing:
    """Summarize samples in milliseconds a run; `repeats` runs make up a sample, and `tokens` are new in each run."""
    p10, median, p90 = (float(value) for value in np.percentile(samples, [10, 50, 90]))
    rate = None if tokens is None else 1e3 * tokens / median
    return Timing(median_ms=median, p10_ms=p10, p90_ms=p90, runs=samples.size * repeats, tokens_per_second=rate)


def ratio_interval(numerator: Floats, denominator: Floats, seed: int = 0) -> Interval:
    """The ratio of medians of paired samples, with the bootstrap interval that the estimate of a repeat falls in (95%).

    Args:
        numerator: times of one session, [sets, rounds]; at least two sets.
        denominator: times of the other in the same rounds, the same shape.
        seed: of the resampling.

    The ratio of medians is taken set by set, and the median of these is the estimate. On a machine whose load changes,
    samples pooled over the sets are a mixture, and the ratio of two mixtures' medians jumps: in A/A runs with a load of
    6 on 4 cores it was off by 12% (root mean square), the median over the sets by 4%.

    Whole sets are resampled, never rounds: rounds of a set share the luck of its sessions (where memory and threads
    came to lie; ratios varied by 2-3% from set to set where the rounds explained 1-2%) and the mood of the machine, so
    that resampling rounds gives intervals that are too narrow. With few sets a percentile interval is too narrow as
    well, and is widened as Student's t is against the normal distribution (the expanded percentile interval of
    Hesterberg, "What Teachers Should Know About the Bootstrap", 2015).

    That interval is for the ratio itself. The estimate of a second measurement strays as far from it as the first one's
    did, so the two lie sqrt(2) times as far apart, and the interval is widened by that: of 10 repeats of MiniLM against
    its half, 6 fell into the first one's unwidened interval.
    """
    ratios = np.log(np.median(numerator, axis=1) / np.median(denominator, axis=1))
    widening = stats.t.ppf(0.975, len(ratios) - 1) * sqrt(len(ratios) / (len(ratios) - 1))
    found = stats.bootstrap(
        (ratios,),
        np.median,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=2 * stats.norm.cdf(widening) - 1,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    middle = np.median(ratios)
    low, high = (middle + sqrt(2) * (end - middle) for end in (found.low, found.high))
    estimate, low, high = (float(np.exp(value)) for value in (middle, low, high))
    return Interval(estimate=estimate, low=low, high=high)


def control_fault(control: Interval) -> str | None:
    """Why a dense-against-dense interval cannot vouch for its measurement, or None where it can."""
    interval = f"dense against itself measured {control.estimate:.3f} [{control.low:.3f}, {control.high:.3f}]"
    if not control.low <= 1 <= control.high:
        return f"{interval}, which misses 1: the machine favoured one session"
    if control.high - control.low > CONTROL_WIDTH:
        return f"{interval}, which is wider than {CONTROL_WIDTH:.2f}: the machine was too noisy"
    return None


def judge(speedup: Interval, control: Interval) -> tuple[Verdict, str | None]:
    """The verdict on a measurement, and the reason where it is inconclusive."""
    if fault := control_fault(control):
        return "inconclusive", fault
    if speedup.low > 1:
        return "faster", None
    return ("slower" if speedup.high < 1 else "no difference shown"), None
