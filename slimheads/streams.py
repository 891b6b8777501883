"""stdout and stderr that may be closed, or lose their reader (`| head`): neither is a failure of the command."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class SteadyConsole(Console):
    """A rich console that goes quiet where its reader leaves; rich's own ends the process with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True
        _into_nothing(self.file.fileno())


def open_standard_streams() -> None:
    """Gives a process that was started with stdout or stderr closed (`>&-`) one that leads nowhere.

    Else the first file that is opened takes the number, and what libraries print goes into it.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _into_nothing(number)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def flush_standard_streams() -> None:
    """Writes out what is left. Python would complain at exit about a reader that has gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _into_nothing(stream.fileno())


def _into_nothing(number: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
