"""Samples of run times in ONNX Runtime, of all files in interleaved rounds and in many sets of sessions.

A measurement consists of *session sets*: one session of every file and one more of the first (the control), opened in
random order. A set has *rounds*: each session runs once per round, in random order. Background load affects all
sessions of a round alike. What makes one session fast or slow as a whole, such as memory placement, is averaged over
the sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimheads.errors import UsageError, one_line
from slimheads.formatting import shape_text
from slimheads.names import Shape
from slimheads.runtime.io_binding import BoundRun, Feed, bind, feed_for
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import ORT_ERRORS, open_session

Floats = NDArray[np.float64]
Clock = Callable[[], int]

SETS = 10  # session sets before a measurement is judged
_MIN_SAMPLE_NS = 1_000_000  # shorter runs are repeated within a sample, against clock resolution and overhead
_MIN_WARM_UP_NS = 20_000_000  # CPU frequency and caches take milliseconds to settle, however short a run is
_MAX_ROUNDS = 10_000  # in one set


@dataclass(frozen=True)
class Effort:
    """How long to measure a shape: at least `min_seconds` in timed runs and `min_pairs` rounds.

    Where the control is noisy, up to `extension` times as long and as many session sets.
    """

    min_seconds: float
    min_pairs: int
    extension: int


@dataclass
class Series:
    """The samples so far at one shape. Roles are the files in order, then the control."""

    sets: list[Floats] = field(default_factory=list)  # each [rounds, roles], milliseconds per run
    rounds: int = 0  # per set
    repeats: int = 1  # runs per sample
    seconds: float = 0.0  # in timed runs
    next_check: int = 0  # of the control, at this many sets
    done: bool = False

    def samples(self, role: int) -> Floats:
        """One role's samples, [sets, rounds], milliseconds per run."""
        return np.array(self.sets)[:, :, role]

    def share(self, effort: Effort) -> float:
        """How much is done, 0 to 1; it falls where the control asks for more session sets."""
        sets = len(self.sets) / max(SETS, self.next_check)
        return 1.0 if self.done else min(1.0, sets, self.seconds / effort.min_seconds)

    def update_done(self, effort: Effort, control_ok: Callable[[Floats, Floats], bool]) -> None:
        """Decides whether another set is needed.

        Args:
            effort: how long to measure.
            control_ok: from the samples of the first file and of its control, whether the machine was quiet enough.

        The control is checked when the minimum is reached and then only every SETS sets: checking after each set would
        bias it towards passing.
        """
        count = len(self.sets)
        if count >= effort.extension * SETS:
            self.done = True
        elif count >= max(SETS, self.next_check) and self.seconds >= effort.min_seconds:
            long_enough = self.seconds >= effort.extension * effort.min_seconds
            self.done = long_enough or control_ok(self.samples(0), self.samples(-1))
            self.next_check = count + SETS


def measure(
    files: Sequence[Path],
    shapes: Sequence[Shape],
    effort: Effort,
    *,
    provider: str,
    threads: int,
    control_ok: Callable[[Floats, Floats], bool],
    seed: int,
    on_progress: Callable[[str], None],
    on_share: Callable[[float], None] = lambda share: None,
) -> dict[Shape, Series]:
    """Rounds of all files at every shape in the same session sets, until each shape is finished.

    Args:
        files: ONNX files that take a transformer's inputs. The first is the one that has a control.
        shapes: as `feed_for` takes them.
        effort, control_ok: as for `Series.update_done`.
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
            series[shape].update_done(effort, control_ok)
            on_progress(f"latency {shape_text(shape)}: session set {len(series[shape].sets)}")
            on_share(sum(one.share(effort) for one in series.values()) / len(series))
        del sessions  # before the next set is opened, because memory holds one set
    return series


def _open(
    files: Sequence[Path], provider: str, threads: int, rng: np.random.Generator
) -> list[onnxruntime.InferenceSession]:
    """A session of each file, opened in random order, because memory placement depends on the order."""
    opened = {role: open_session(files[role], provider, threads) for role in rng.permutation(len(files)).tolist()}
    return [opened[role] for role in range(len(files))]


def _bound(session: onnxruntime.InferenceSession, feed: Feed, file: Path, shape: Shape) -> BoundRun:
    try:
        return bind(session, feed)
    except ORT_ERRORS as error:
        raise _cannot_run(str(file), shape, error) from error


def _failing(runs: Sequence[BoundRun], files: Sequence[Path]) -> str:
    """The file whose run fails, found by running each once more; all files where none fails again."""
    for run, file in zip(runs, files, strict=True):
        try:
            run()
        except ORT_ERRORS:
            return str(file)
    return " or ".join(dict.fromkeys(map(str, files)))


def _cannot_run(file: str, shape: Shape, error: Exception) -> UsageError:
    return UsageError(
        f"ONNX Runtime cannot run the shape {list(shape)} ({one_line(error)})",
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
    """Warms up the runs of one session set, then adds its rounds. The first set fixes the number of rounds per set.

    All sets have the same number of rounds, so that they weigh the same.
    """
    run_ns = warm_up(runs, clock, limit_ns=int(0.5e9 * min_seconds / SETS))
    if not series.sets:
        series.repeats = max(1, ceil(_MIN_SAMPLE_NS / min(run_ns)))
        # A tenth more than needed: otherwise a machine that speeds up a little would always need one more set.
        in_time = 1.1e9 * min_seconds / SETS / (sum(run_ns) * series.repeats)
        series.rounds = min(_MAX_ROUNDS, ceil(max(in_time, min_pairs / SETS)))
    start = clock()
    rounds = [one_round(runs, order, series.repeats, clock) for order in _orders(series.rounds, len(runs), rng)]
    series.seconds += (clock() - start) / 1e9
    series.sets.append(np.array(rounds) / 1e6)


def warm_up(runs: Sequence[Callable[[], object]], clock: Clock, limit_ns: int) -> list[float]:
    """Runs all in turns until the times settle, for at least 20 ms.

    That is 4 to 50 turns, more where runs are short, and as few as 2 where they take longer than the limit.

    Settled: the quickest of the last two turns is within 5% of the quickest before.

    Returns:
        The quickest time of each run in nanoseconds. Later runs are rarely quicker, so a time planned with it is
        reached.
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
    """Times each run once, in the given order; nanoseconds per run, in the order of `runs`."""
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
