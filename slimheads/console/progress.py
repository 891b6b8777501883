"""Progress on stderr: one live display in a terminal; elsewhere lines for start and end of a stage, and a heartbeat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

HEARTBEAT = 30.0  # seconds between two lines about the same stage
_LEAST_SHARE = 0.05  # of the work done: before that, the pace says little about what is left
_REFRESHES = 2  # per second: drawing takes time from what is being measured

Clock = Callable[[], float]


@dataclass
class Activity:
    """The running stage. `share` is of its work, 0 to 1; None where it is unknown."""

    stage: str
    started: float  # the clock's seconds
    note: str = ""
    share: float | None = None

    def left(self, now: float) -> float | None:
        """Seconds left at the pace so far; None where nothing is known."""
        if self.share is None or self.share < _LEAST_SHARE:
            return None
        return (now - self.started) * (1 - self.share) / self.share


class Display:
    """What both displays share: the running stage, and when a run is to end. A `pipeline.progress.Progress`."""

    def __init__(
        self, console: Console, check: Callable[[], None] = lambda: None, clock: Clock = time.monotonic
    ) -> None:
        """`check` is called whenever there is something to show, and may raise to end the run there."""
        self._console, self._check, self._clock = console, check, clock
        self._activity: Activity | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def start(self, stage: str) -> None:
        """A stage begins; nothing is printed yet."""
        self._check()
        self._activity = Activity(stage, self._clock())

    def work(self, about: str) -> None:
        """Its work begins."""
        self._check()
        if self._activity:
            self._activity.started, self._activity.note = self._clock(), about

    def note(self, line: str) -> None:
        """What it is doing now."""
        self._check()
        if self._activity:
            self._activity.note = line

    def share(self, done: float) -> None:
        """How much of its work is done, 0 to 1."""
        self._check()
        if self._activity:
            self._activity.share = done

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """It is done: one line."""
        self._check()
        self._activity = None
        self._line(stage, f"reused (took {seconds:.1f} s)" if reused else f"{seconds:.1f} s")

    def _line(self, stage: str, what: str) -> None:
        self._console.print(f"{stage:<8} {what}", markup=False, highlight=False, soft_wrap=True)


class LogDisplay(Display):
    """Plain lines, for a file or a pipe: few enough to be kept."""

    def __init__(
        self,
        console: Console,
        check: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        super().__init__(console, check, clock)
        self._heartbeat = heartbeat
        self._over, self._lock = threading.Event(), threading.RLock()
        self._quiet_since = clock()  # when the last stage started or ended
        self._thread = threading.Thread(target=self._beats, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def start(self, stage: str) -> None:
        """A stage begins; nothing is printed yet."""
        with self._lock:
            super().start(stage)
            self._quiet_since = self._clock()

    def work(self, about: str) -> None:
        """Its work begins: one line."""
        with self._lock:
            super().work(about)
            if self._activity:
                self._line(self._activity.stage, f"starts: {about}" if about else "starts")
            self._quiet_since = self._clock()

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """It is done: one line."""
        with self._lock:
            super().finish(stage, seconds, reused)

    def beat(self) -> None:
        """One line on a stage that has been running for long; nothing after the end."""
        with self._lock:
            activity, now = self._activity, self._clock()
            if self._over.is_set() or activity is None or now - self._quiet_since < self._heartbeat:
                return
            left = activity.left(now)
            so_far = f"{_span(now - activity.started)} so far" + (f", about {_span(left)} left" if left else "")
            self._line(activity.stage, f"{so_far}: {activity.note}" if activity.note else so_far)

    def _beats(self) -> None:
        while not self._over.wait(self._heartbeat):
            self.beat()


class LiveDisplay(Display):
    """One live line with a bar over all stages; the lines of finished stages stay above it."""

    def __init__(
        self,
        console: Console,
        check: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
        stages: int = 1,
    ) -> None:
        """`stages` is the number of stages that will be reported, at most."""
        super().__init__(console, check, clock)
        self._stages, self._done = stages, 0
        # Where stderr is this terminal, what others print there goes above the bar as well.
        self._bars = Bars(
            _Part("stage", Column(no_wrap=True)),
            BarColumn(bar_width=16),
            _Left(clock),
            _Part("note", Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            transient=True,
            refresh_per_second=_REFRESHES,
            redirect_stdout=False,
            expand=True,
        )
        self._task: TaskID | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, stage: str) -> None:
        """A stage begins."""
        super().start(stage)
        if self._task is None:
            self._task = self._bars.add_task("", total=None, activity=self._activity)
            self._bars.start()
        self._draw()
        self._bars.refresh()  # or the line of a stage that ends soon would stand above an earlier stage's name

    def work(self, about: str) -> None:
        """Its work begins."""
        super().work(about)
        self._draw()

    def note(self, line: str) -> None:
        """What it is doing now."""
        super().note(line)
        self._draw()

    def share(self, done: float) -> None:
        """How much of its work is done, 0 to 1."""
        super().share(done)
        self._draw()

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """It is done: one line, above the bar."""
        super().finish(stage, seconds, reused)
        self._done += 1
        self._draw()

    def _draw(self) -> None:
        if self._task is None:
            return
        share = self._activity.share if self._activity else None
        known = self._stages > 1 or share is not None
        self._bars.update(
            self._task,
            total=self._stages if known else None,  # a bar without a total moves without saying how far
            completed=self._done + (share or 0.0),
            activity=self._activity,
        )


class _Part(ProgressColumn):
    """The running stage's name or note."""

    max_refresh = None

    def __init__(self, part: str, column: Column) -> None:
        super().__init__(column)
        self._part = part

    def render(self, task: Task) -> Text:
        activity: Activity | None = task.fields["activity"]
        return Text(str(getattr(activity, self._part, "")), style="bold" if self._part == "stage" else "dim")


class _Left(ProgressColumn):
    """How long the running stage has taken, and how much time is left where that is known."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(Column(no_wrap=True))
        self._clock = clock

    def render(self, task: Task) -> Text:
        activity: Activity | None = task.fields["activity"]
        if activity is None:
            return Text()
        now = self._clock()
        left = activity.left(now)
        return Text(f"about {_span(left)} left" if left is not None else _span(now - activity.started))


def display(console: Console, check: Callable[[], None], stages: int = 1) -> Display:
    """The display that suits where the console writes to."""
    if console.is_terminal:
        return LiveDisplay(console, check, stages=stages)
    return LogDisplay(console, check)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
