"""Latency: dense against slim in ONNX Runtime, in interleaved pairs, with a control and an interval.

A measurement is made of *session sets*: dense, slim and a second dense session (the control), opened afresh in random
order. Within a set come *rounds*: each of the three runs once, in random order. What disturbs the machine disturbs the
three of a round alike; what makes one session lucky for its whole life is averaged over the sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.inputs import without_length
from slimheads.interface import Array, Interface, inputs_for, read_interface
from slimheads.sessions import ORT_ERRORS, open_session, require_provider
from slimheads.wording import shape_text

Verdict = Literal["faster", "slower", "no difference shown", "inconclusive", "not measured"]
Shape = tuple[int, ...]  # (batch, length), (batch, length, past), (batch, length, past, encoder's positions), (batch,)
Floats = NDArray[np.float64]

SETS = 10  # session sets before a measurement is judged; at most EXTENSION times as many where it is prolonged
EXTENSION = 3
CONTROL_WIDTH = 0.10  # a control interval wider than this cannot vouch for anything
RESAMPLES = 9999
_MIN_SAMPLE_NS = 1_000_000  # shorter runs are repeated within a sample: the clock's grain and Python's own cost fade
_MAX_ROUNDS = 10_000  # in one set


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


class Samples(BaseModel):
    """Every sample in the order it was taken, in milliseconds a run: a row a session set, a column a round."""

    model_config = ConfigDict(frozen=True)
    dense: tuple[tuple[float, ...], ...]
    slim: tuple[tuple[float, ...], ...]
    control: tuple[tuple[float, ...], ...]


class Latency(BaseModel):
    """One measurement: one provider, thread count, precision and shape."""

    model_config = ConfigDict(frozen=True)
    provider: str
    threads: int
    graph: str | None = None  # which file's, where a model is more than one: "encoder_model"
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
    samples: Samples | None = Field(default=None, exclude=True, repr=False)  # for plots; report.json goes without


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
            encoder's positions) of each measurement; (batch,) where inputs have no length.
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
        EnvironmentLackError: the provider is missing and `on_missing` is "fail".
    """
    if not 0 < min_seconds < inf or min_pairs < 1:
        raise UsageError(
            f"min_seconds {min_seconds} with min_pairs {min_pairs} measures nothing",
            where="bench",
            hint="give a positive time and at least one pair",
        )
    shapes = tuple(tuple(shape) for shape in shapes)
    ratios = {shape: dense_flops / slim_flops for shape, (dense_flops, slim_flops) in (flops or {}).items()}
    row = partial(Latency, provider=provider, threads=threads, precision=precision, graph=graph)
    pair = _Pair(Path(dense), Path(slim), provider, threads, seed)
    try:
        require_provider(provider)
        if not read_interface(dense).has_length:
            shapes = without_length(shapes)
        series = _measure(pair, shapes, min_seconds, min_pairs, on_progress or (lambda line: None))
    except EnvironmentLackError as error:
        if on_missing == "fail":
            raise
        return tuple(
            row(shape=shape, flop_speedup=ratios.get(shape), verdict="not measured", reason=str(error))
            for shape in shapes
        )
    return tuple(_result(partial(row, shape=shape), series[shape], ratios.get(shape), seed) for shape in shapes)


def _result(row: Callable[..., Latency], series: Series, flop_speedup: float | None, seed: int) -> Latency:
    dense, slim, control = (series.samples(role) for role in range(3))
    speedup, dense_twice = ratio_interval(dense, slim, seed), ratio_interval(dense, control, seed)
    verdict, reason = judge(speedup, dense_twice)
    return row(
        dense=timing(dense, series.repeats),
        slim=timing(slim, series.repeats),
        speedup=speedup,
        control=dense_twice,
        flop_speedup=flop_speedup,
        realised=None if flop_speedup is None else speedup.estimate / flop_speedup,
        verdict=verdict,
        reason=reason,
        samples=Samples(dense=dense.tolist(), slim=slim.tolist(), control=control.tolist()),
    )


# ---------------------------------------------------------------------------------------------------------- statistics


def timing(samples: Floats, repeats: int = 1) -> Timing:
    """Summarize samples in milliseconds a run; `repeats` runs make up a sample."""
    p10, median, p90 = np.percentile(samples, [10, 50, 90])
    return Timing(median_ms=float(median), p10_ms=float(p10), p90_ms=float(p90), runs=samples.size * repeats)


def ratio_interval(numerator: Floats, denominator: Floats, seed: int = 0) -> Interval:
    """The ratio of medians of paired samples, with its 95% bootstrap interval.

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
    estimate, low, high = (float(np.exp(value)) for value in (np.median(ratios), found.low, found.high))
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


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Pair:
    dense: Path
    slim: Path
    provider: str
    threads: int
    seed: int

    def open(self, rng: np.random.Generator) -> tuple[onnxruntime.InferenceSession, ...]:
        """Dense, slim and control, opened in random order: who comes first gets other memory than who comes last."""
        paths = (self.dense, self.slim, self.dense)
        opened = {role: open_session(paths[role], self.provider, self.threads) for role in rng.permutation(3).tolist()}
        return tuple(opened[role] for role in range(3))


@dataclass
class Series:
    """What was measured so far at one shape."""

    sets: list[Floats] = field(default_factory=list)  # each [rounds, 3], milliseconds a run
    rounds: int = 0  # a set
    repeats: int = 1  # runs a sample
    seconds: float = 0.0  # in timed runs
    next_look: int = 0  # not before this many sets
    done: bool = False

    def samples(self, role: int) -> Floats:
        return np.array(self.sets)[:, :, role]

    def consider(self, min_seconds: float, seed: int) -> None:
        """Decide whether another set is needed.

        The control is looked at when the minimum is reached and then only every SETS sets: stopping at the first moment
        it suits would flatter it.
        """
        count = len(self.sets)
        if count >= EXTENSION * SETS:
            self.done = True
        elif count >= max(SETS, self.next_look) and self.seconds >= min_seconds:
            control = ratio_interval(self.samples(0), self.samples(2), seed)
            self.done = self.seconds >= EXTENSION * min_seconds or control_fault(control) is None
            self.next_look = count + SETS


def _measure(
    pair: _Pair, shapes: Sequence[Shape], min_seconds: float, min_pairs: int, on_progress: Callable[[str], None]
) -> dict[Shape, Series]:
    """Rounds at every shape in the same session sets, until each shape is finished."""
    interfaces = (read_interface(pair.dense), read_interface(pair.slim))
    feeds = {shape: [_feed(interface, shape, pair.seed) for interface in interfaces] for shape in shapes}
    series = {shape: Series() for shape in shapes}
    rng = np.random.default_rng(pair.seed)
    while pending := [shape for shape in series if not series[shape].done]:
        sessions = pair.open(rng)
        for index in rng.permutation(len(pending)).tolist():
            shape = pending[index]
            dense, slim = feeds[shape]
            runs = [
                partial(session.run, None, feed) for session, feed in zip(sessions, (dense, slim, dense), strict=True)
            ]
            try:
                add_set(series[shape], runs, rng, min_seconds=min_seconds, min_pairs=min_pairs)
            except ORT_ERRORS as error:
                raise UsageError(
                    f"ONNX Runtime cannot run the shape ({' '.join(str(error).split())[:200]})",
                    where=f"{pair.dense} or {pair.slim}, shape {list(shape)}",
                    hint="give a shape that both files accept",
                ) from error
            del runs
            series[shape].consider(min_seconds, pair.seed)
            on_progress(f"latency {shape_text(shape)}: session set {len(series[shape].sets)}")
        del sessions  # before the next are opened: three at a time are enough for the memory
    return series


def _feed(interface: Interface, shape: Shape, seed: int) -> dict[str, Array]:
    if len(shape) not in ((2, 3, 4) if interface.has_length else (1,)):
        raise UsageError(
            f"{list(shape)} is not a shape", where="shapes", hint="give [batch, length] or [batch, length, past]"
        )
    batch, length, past = (*shape, *(1, 0)[len(shape) - 1 :])[:3]
    return inputs_for(interface, batch, length, past, seed, encoder_length=shape[3] if len(shape) > 3 else None)


Clock = Callable[[], int]


def add_set(
    series: Series,
    runs: Sequence[Callable[[], object]],
    rng: np.random.Generator,
    *,
    min_seconds: float,
    min_pairs: int,
    clock: Clock = time.perf_counter_ns,
) -> None:
    """Warm the runs of one session set up, then add its rounds; the first set decides how many rounds a set has.

    Every set has the same number of rounds, so that none weighs more than another.
    """
    run_ns = warm_up(runs, clock, limit_ns=int(0.5e9 * min_seconds / SETS))
    if not series.sets:
        series.repeats = max(1, ceil(_MIN_SAMPLE_NS / min(run_ns)))
        # A tenth more than needed, or a machine that speeds up a little would always need one set more.
        in_time = 1.1e9 * min_seconds / SETS / (sum(run_ns) * series.repeats)
        series.rounds = min(_MAX_ROUNDS, ceil(max(in_time, min_pairs / SETS)))
    start = clock()
    rounds = [one_round(runs, order, series.repeats, clock) for order in _orders(series.rounds, len(runs), rng)]
    series.seconds += (clock() - start) / 1e9
    series.sets.append(np.array(rounds) / 1e6)


def warm_up(runs: Sequence[Callable[[], object]], clock: Clock, limit_ns: int) -> list[float]:
    """Run in turns until the times settle: 4 to 50 turns, or as few as 2 where these take longer than the limit.

    Settled: the quickest turn of the last two is within 5% of the quickest before. Returns the quickest time of
    each run in nanoseconds: what came later will hardly be quicker, so a time planned with it is reached.
    """
    start, turns = clock(), list[list[float]]()
    while len(turns) < 50:
        turns.append(one_round(runs, range(len(runs)), 1, clock))
        totals = [sum(turn) for turn in turns]
        settled = len(turns) >= 4 and min(totals[-2:]) > 0.95 * min(totals[:-2])
        if settled or (len(turns) >= 2 and clock() - start > limit_ns):
            break
    return [max(1.0, float(quickest)) for quickest in np.min(turns, axis=0)]


def one_round(
    runs: Sequence[Callable[[], object]], order: Sequence[int] | NDArray[np.intp], repeats: int, clock: Clock
) -> list[float]:
    """Time each run once, in the given order; nanoseconds a run, in the order of `runs`."""
    times = [0.0] * len(runs)
    for role in order:
        run = runs[role]
        start = clock()
        for _ in range(repeats):
            run()
        times[role] = (clock() - start) / repeats
    return times


def _orders(rounds: int, roles: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    yield from rng.permuted(np.tile(np.arange(roles), (rounds, 1)), axis=1)
