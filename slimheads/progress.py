"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status


class Progress(Protocol):
    """Told about a run as it goes."""

    def start(self, stage: str) -> None:
        """A stage begins."""

    def note(self, line: str) -> None:
        """What the stage is doing now."""

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """A stage is done, or an earlier run's result is used."""


class Silent:
    """Says nothing; for callers from Python."""

    def start(self, stage: str) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """Nothing."""


class Display:
    """One line a finished stage; on a terminal the running stage has a live line with what it is doing."""

    def __init__(self, console: Console, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called whenever there is something to show, and may raise to end the run there."""
        self._console = console
        self._check = check
        self._live: Status | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self, stage: str) -> None:
        """A stage begins."""
        self._check()
        self._stage = stage
        if self._console.is_terminal:
            self._live = self._console.status(f"[bold]{stage}[/bold]")
            self._live.start()

    def note(self, line: str) -> None:
        """What the stage is doing now; kept only where the display is not live."""
        self._check()
        if self._live:
            self._live.update(f"[bold]{self._stage}[/bold]  [dim]{escape(line)}[/dim]")
        elif not self._console.is_terminal:
            self._console.print(f"  {self._stage}: {line}", markup=False, highlight=False, soft_wrap=True)

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """A stage is done, or an earlier run's result is used."""
        self._check()
        self._stop()
        how = f"reused (took {seconds:.1f} s)" if reused else f"{seconds:.1f} s"
        self._console.print(f"{stage:<8} {how}", markup=False, highlight=False)

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None
