"""One class a failure: each knows its exit code, and every message says what, where and what to do."""

from __future__ import annotations


class SlimheadsError(Exception):
    """A failure with a known cause.

    Args:
        what: what went wrong, in one sentence without a full stop.
        where: the file, line, tensor or link it concerns, if there is one.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what)

    def __str__(self) -> str:
        """The failure as one line: `where: what; hint`."""
        line = f"{self.where}: {self.what}; {self.hint}" if self.where else f"{self.what}; {self.hint}"
        return " ".join(line.split())


class UsageError(SlimheadsError):
    """The recipe or the command line asks for something that cannot be."""

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


def in_short(error: Exception) -> str:
    """The first line of an error, or its class's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
