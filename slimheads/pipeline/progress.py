"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

from typing import Protocol


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
