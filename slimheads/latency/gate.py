"""The latency gate of a recipe and of `slimheads bench`: whether a measured ratio is within a limit."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from slimheads.errors import GateError, UsageError
from slimheads.formatting import shape_text
from slimheads.latency.records import Latency


class Bound(NamedTuple):
    """Whether a latency ratio is within the limit, the ratio that decided, and both in words."""

    met: bool
    ratio: float | None
    reason: str


def latency_bound(rows: Sequence[Latency], limit: float, names: tuple[str, str] = ("dense", "slim")) -> Bound:
    """Whether second / first latency is at most `limit` in every shape, and conclusively.

    The worst row decides. A limit below 1 requires a speedup that is shown in every row: one within the noise does not
    count.
    """
    measured = [row for row in rows if row.speedup is not None]
    if not measured:
        return Bound(False, None, "no latency was measured")
    noise = ("inconclusive", "no difference shown") if limit < 1 else ("inconclusive",)
    undecided = next((row for row in measured if row.verdict in noise), None)
    worst = undecided or min(measured, key=lambda row: row.speedup.estimate if row.speedup else 0.0)
    ratio = 1 / worst.speedup.estimate if worst.speedup else None
    graph = f"{worst.graph}, " if worst.graph else ""
    where = f"{shape_text(worst.shape)} ({graph}{worst.provider}, {worst.precision})"
    met = undecided is None and ratio is not None and ratio <= limit
    said = f"{worst.verdict} at {where}" if undecided else f"{names[1]} / {names[0]} latency {ratio:.3f} at {where}"
    return Bound(met, ratio, f"{said}, {'within' if met else 'not within'} {limit}")


def require_limit(limit: float, where: str) -> None:
    """Refuses a limit that is no ratio, before anything is measured.

    Raises:
        UsageError: naming the option.
    """
    if not 0 < limit < inf:
        raise UsageError(f"{limit} is no latency ratio", where=where, hint="give a number above 0, e.g. 0.95")


def require_ratio(rows: Sequence[Latency], limit: float, *, asked: str, names: tuple[str, str]) -> None:
    """Refuses a measurement in which second / first latency is not, conclusively, at most `limit` in every shape.

    Args:
        asked: the key or option that set the limit, for the message.
        names: of the two files, for the message.

    Raises:
        GateError: naming the shape that decided.
    """
    bound = latency_bound(rows, limit, names)
    if not bound.met:
        hint = "measure on an idle machine, or allow more"
        raise GateError(f"the latency gate was not met: {bound.reason}", where=asked, hint=hint)
