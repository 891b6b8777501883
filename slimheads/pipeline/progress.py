"""How a run reports its progress. The console decides how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called during a run; for each stage `start`, then `work` unless an earlier result is reused, then `finish`."""

    def start(self, stage: str) -> None:
        """The stage's earlier result is being looked for."""

    def work(self, about: str) -> None:
        """The stage's work begins; `about` says what it will do, and how long that takes if it is known."""

    def note(self, line: str) -> None:
        """What the stage is doing now."""

    def share(self, done: float) -> None:
        """How much of the stage's work is done, 0 to 1. It may fall, where more turns out to be needed."""

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """The stage is done, or an earlier run's result is reused; `seconds` are those of the work."""


class Silent:
    """Shows nothing; for callers from Python."""

    def start(self, stage: str) -> None:
        """Nothing."""

    def work(self, about: str) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""

    def share(self, done: float) -> None:
        """Nothing."""

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        """Nothing."""
