"""How the command ends: a signal, a failure in one line on stderr, and the exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import typer

from slimheads.errors import EnvironmentLackError, SlimheadsError, UsageError, one_line

# Typer exports only one of its parser's errors: what they have in common is its base class.
_UsageProblem: Any = typer.BadParameter.__base__

# What the commands without a recipe call its keys.
_OPTIONS = {
    "model": "MODEL",
    "task": "--task",
    "bench.providers": "--provider",
    "bench.shapes": "--shape",
    "bench.threads": "--threads",
}
_signals: list[int] = []  # that came


class Interrupted(BaseException):
    """A signal ends the process; not an Exception, so that only `exit_code` catches it."""

    def __init__(self, number: int) -> None:
        self.number = number


def handle_signals() -> None:
    """From here on SIGINT and SIGTERM raise `Interrupted`."""
    _signals.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def raise_if_interrupted() -> None:
    """Raises `Interrupted` once more: Python drops what is raised inside an import hook or a finalizer, and a library
    may catch everything.
    """
    if _signals:
        raise Interrupted(_signals[-1])


def exit_code(command: Callable[[], int], *, debug: bool) -> int:
    """Runs a command. However it ends becomes an exit code, and every failure one line; with `debug`, a traceback."""
    try:
        return command()
    except (BrokenPipeError, SystemExit):  # the reader of the help left, of which rich makes an exit
        return 0
    except Interrupted as end:
        complain("interrupted; nothing half-made was left, and finished stages will be reused")
        return 128 + end.number
    except Exception as error:
        code, line = _failure(error)
        if debug:
            traceback.print_exc()
        complain(line)
        return code


def complain(line: str) -> None:
    """One line on stderr."""
    with suppress(BrokenPipeError):
        print(f"slimheads: {line}", file=sys.stderr, flush=True)


def silence_libraries() -> None:
    """Keeps log lines and warnings of other libraries off stderr: they are about their own use, not about the model.

    Our own warnings are shown. A library that calls `logging.basicConfig` finds a handler and changes nothing.
    """
    logging.captureWarnings(True)
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):  # read when they are imported
        os.environ.setdefault(name, "error")
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())
    own = logging.getLogger("slimheads")
    if not own.handlers:
        own.addHandler(_Complaints(logging.WARNING))


class _Complaints(logging.Handler):
    """Shows a log record as the command shows its own messages."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def _failure(error: Exception) -> tuple[int, str]:
    """The exit code and the line of what a command raised."""
    if isinstance(error, _UsageProblem):
        command = error.ctx.command_path if error.ctx else "slimheads"
        where = command.removeprefix("slimheads").strip() or None
        error = UsageError(error.format_message().rstrip("."), where=where, hint=f"see {command} --help")
    if isinstance(error, SlimheadsError):
        error.where = error.where or next((_OPTIONS[key] for key in error.keys if key in _OPTIONS), None)
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return EnvironmentLackError.exit_code, "out of memory; use a machine with more, or smaller bench.shapes"
    return 1, f"internal error: {type(error).__name__}: {one_line(error, 300)}; run again with --debug and report it"


def _interrupt(number: int, _frame: FrameType | None) -> None:
    # A second signal ends the process at once, whatever the first is still cleaning up.
    signal.signal(number, signal.SIG_DFL)
    _signals.append(number)
    raise Interrupted(number)
