"""One class per kind of failure, with its exit code; every message says what failed, where, and what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager


class SlimheadsError(Exception):
    """A failure with a known cause.

    Args:
        what: what went wrong, in one sentence without a full stop.
        where: the file, line, tensor or link it concerns, if there is one.
        hint: what the user can do about it.
        keys: the recipe keys that it is about, the one at fault first; `Recipe.located` turns them into `where`.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str, keys: tuple[str, ...] = ()) -> None:
        self.what, self.where, self.hint, self.keys = what, where, hint, keys
        super().__init__(what)

    def __str__(self) -> str:
        """The failure as one line: `where: what; hint`."""
        where = self.where or next(iter(self.keys), None)
        line = f"{where}: {self.what}; {self.hint}" if where else f"{self.what}; {self.hint}"
        return " ".join(line.split())


class UsageError(SlimheadsError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class ModelRefusedError(SlimheadsError):
    """The model is not covered, unsafe or damaged."""

    exit_code = 3


class CertificateError(SlimheadsError):
    """A link of the certificate did not hold: what was built is not what was planned."""

    exit_code = 4


class EnvironmentLackError(SlimheadsError):
    """The machine or the installation lacks something: a provider, a package, memory, disk."""

    exit_code = 5


class OutputBusyError(SlimheadsError):
    """Another run holds the output folder."""

    exit_code = 6


class GateError(SlimheadsError):
    """A gate of the recipe was not met."""

    exit_code = 7


def require_known(key: str, value: object, known: Collection[object]) -> None:
    """Refuses a name that is not among the known ones.

    Raises:
        UsageError: about the recipe's key `key`, with all known names.
    """
    if value not in known:
        names = ", ".join(map(str, known))
        raise UsageError(f"{value!r} is not known", keys=(key,), hint=f"use one of {names}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """An error's whole message on one line, cut after `limit` characters; the name of its class if it is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@contextmanager
def about_keys(*keys: str) -> Iterator[None]:
    """Errors inside that name neither a place nor recipe keys are about these recipe keys."""
    try:
        yield
    except SlimheadsError as error:
        if error.where is None and not error.keys:
            error.keys = keys
        raise
