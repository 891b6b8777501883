"""Samples of how long files take in ONNX Runtime: all of them in turns, in sessions that are opened again and again.

A measurement is made of *session sets*: one session of every file and one more of the first (the control), opened
afresh in random order. Within a set come *rounds*: each of them runs once, in random order. What disturbs the machine
disturbs the sessions of a round alike; what makes one session lucky for its whole life is averaged over the sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimheads.errors import UsageError
from slimheads.formatting import shape_text
from slimheads.names import Shape
from slimheads.runtime.io_binding import BoundRun, Feed, bind, feed_for
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import ORT_ERRORS, open_session

Floats = NDArray[np.float64]
Clock = Callable[[], int]

SETS = 10  # session sets before a measurement is judged
_MIN_SAMPLE_NS = 1_000_000  # shorter runs are repeated within a sample: the clock's grain and Python's own cost fade
_MIN_WARM_UP_NS = 20_000_000  # a clock that rises and caches that fill take milliseconds, however short a run is
_MAX_ROUNDS = 10_000  # in one set


@dataclass(frozen=True)
class Effort:
    """How long to measure a shape for: at least `min_seconds` in timed runs and `min_pairs` rounds.

    Where the control asks for it, up to `extension` times as long and as many session sets.
    """

    min_seconds: float
    min_pairs: int
    extension: int


@dataclass
class Series:
    """What was measured so far at one shape. Roles are the files in order, and last the control."""

    sets: list[Floats] = field(default_factory=list)  # each [rounds, roles], milliseconds a run
    rounds: int = 0  # a set
    repeats: int = 1  # runs a sample
    seconds: float = 0.0  # in timed runs
    next_look: int = 0  # not before this many sets
    done: bool = False

    def samples(self, role: int) -> Floats:
        """One role's samples, [sets, rounds], milliseconds a run."""
        return np.array(self.sets)[:, :, role]

    def share(self, effort: Effort) -> float:
        """How much is done, 0 to 1; it falls where the control asks for more session sets."""
        sets = len(self.sets) / max(SETS, self.next_look)
        return 1.0 if self.done else min(1.0, sets, self.seconds / effort.min_seconds)

    def consider(self, effort: Effort, vouched: Callable[[Floats, Floats], bool]) -> None:
        """Decide whether another set is needed.

        Args:
            effort: how long to measure for.
            vouched: told the samples of the first file and of its control: whether the machine was quiet enough.

        The control is looked at when the minimum is reached and then only every SETS sets: stopping at the first moment
        it suits would flatter it.
        """
        count = len(self.sets)
        if count >= effort.extension * SETS:
            self.done = True
        elif count >= max(SETS, self.next_look) and self.seconds >= effort.min_seconds:
            long_enough = self.seconds >= effort.extension * effort.min_seconds
            self.done = long_enough or vouched(self.samples(0), self.samples(-1))
            self.next_look = count + SETS


def measure(
    files: Sequence[Path],
    shapes: Sequence[Shape],
    effort: Effort,
    *,
    provider: str,
    threads: int,
    vouched: Callable[[Floats, Floats], bool],
    seed: int,
    on_progress: Callable[[str], None],
    on_share: Callable[[float], None] = lambda share: None,
) -> dict[Shape, Series]:
    """Rounds of all files at every shape in the same session sets, until each shape is finished.

    Args:
        files: ONNX files that take a transformer's inputs. The first is the one that has a control.
        shapes: as `feed_for` takes them.
        effort, vouched: see `Series.consider`.
        provider, threads: as `open_session` takes them.
        seed: of the inputs and the orders.
        on_progress: called with one line of text after each session set of a shape.
        on_share: called along with it, with the share of the measurement that is done, 0 to 1.

    Raises:
        UsageError: a file cannot be opened or fed, or does not run at a shape.
        EnvironmentLackError: the provider is missing.
    """
    roles, interfaces = (*files, files[0]), [read_interface(file) for file in files]
    feeds = {shape: [feed_for(interface, shape, seed) for interface in interfaces] for shape in shapes}
    series = {shape: Series() for shape in shapes}
    rng = np.random.default_rng(seed)
    while pending := [shape for shape in series if not series[shape].done]:
        sessions = _open(roles, provider, threads, rng)
        for index in rng.permutation(len(pending)).tolist():
            shape = pending[index]
            runs = [
                _bound(session, feed, file, shape)
                for session, feed, file in zip(sessions, (*feeds[shape], feeds[shape][0]), roles, strict=True)
            ]
            try:
                add_set(series[shape], runs, rng, min_seconds=effort.min_seconds, min_pairs=effort.min_pairs)
            except ORT_ERRORS as error:
                raise _cannot_run(_failing(runs, roles), shape, error) from error
            del runs
            series[shape].consider(effort, vouched)
            on_progress(f"latency {shape_text(shape)}: session set {len(series[shape].sets)}")
            on_share(sum(one.share(effort) for one in series.values()) / len(series))
        del sessions  # before the next are opened: one set at a time is enough for the memory
    return series


def _open(
    files: Sequence[Path], provider: str, threads: int, rng: np.random.Generator
) -> list[onnxruntime.InferenceSession]:
    """A session of each file, opened in random order: who comes first gets other memory than who comes last."""
    opened = {role: open_session(files[role], provider, threads) for role in rng.permutation(len(files)).tolist()}
    return [opened[role] for role in range(len(files))]


def _bound(session: onnxruntime.InferenceSession, feed: Feed, file: Path, shape: Shape) -> BoundRun:
    try:
        return bind(session, feed)
    except ORT_ERRORS as error:
        raise _cannot_run(str(file), shape, error) from error


def _failing(runs: Sequence[BoundRun], files: Sequence[Path]) -> str:
    """The file whose run fails, by running each once more; all of them where none fails again."""
    for run, file in zip(runs, files, strict=True):
        try:
            run()
        except ORT_ERRORS:
            return str(file)
    return " or ".join(dict.fromkeys(map(str, files)))


def _cannot_run(file: str, shape: Shape, error: Exception) -> UsageError:
    return UsageError(
        f"ONNX Runtime cannot run the shape {list(shape)} ({' '.join(str(error).split())[:200]})",
        where=file,
        keys=("bench.shapes",),
        hint="give a shape that every file accepts",
    )


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
    """Run in turns until the times settle, for 20 ms at least: 4 to 50 turns, as many more as that takes where runs are
    short, and as few as 2 where these take longer than the limit.

    Settled: the quickest turn of the last two is within 5% of the quickest before. Returns the quickest time of
    each run in nanoseconds: what came later will hardly be quicker, so a time planned with it is reached.
    """
    start, least_ns = clock(), min(_MIN_WARM_UP_NS, limit_ns)
    quickest = np.full(len(runs), np.inf)
    totals, before = list[float](), np.inf  # of each turn, and the quickest of all but the last two
    while True:
        turn = one_round(runs, range(len(runs)), 1, clock)
        quickest = np.minimum(quickest, turn)
        totals.append(sum(turn))
        if len(totals) > 2:
            before = min(before, totals[-3])
        elapsed = clock() - start
        settled = len(totals) >= 50 or (len(totals) >= 4 and min(totals[-2:]) > 0.95 * before)
        if (settled and elapsed >= least_ns) or (len(totals) >= 2 and elapsed > limit_ns):
            return [max(1.0, float(time_ns)) for time_ns in quickest]


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
