"""`multiple_of: auto`: the step of head counts that runs fastest per deleted head, by the latency table.

Rules:
1. The steps 1, 2, ... up to the number of threads, and twice that, are tried, except those that the other rules of
   `select` forbid. Each has the plan that `select` makes with it, so that the other layers give up what one layer may
   not.
2. Steps are compared by the predicted saving per deleted unit, because not every step deletes the same number.
3. A step must not be slower than the plan without a step by more than the table's margin or by more than SLACK.
4. Of all steps within the table's margin of the best, the smallest is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from slimheads.errors import UsageError
from slimheads.latency.records import Interval
from slimheads.latency.table import LatencyTable, Weights, saved, weights_of
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores
from slimheads.pruning.select import select

SLACK = 0.01  # of the dense latency
_EXACT = 1e-9  # rounding error of a tie


class StepOption(BaseModel):
    """A step that was tried."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    multiple_of: int
    removed: int  # units
    saved: float  # predicted share of the dense latency, the mean over the shapes


class Selection(BaseModel):
    """The value of `multiple_of`, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    asked: int | Literal["auto"]
    multiple_of: int
    predicted_gain: Interval | None = None  # predicted latency without a step / with it; mean over the shapes
    reason: str | None = None  # why there is no gain
    kept_more: int = 0  # units kept with the step and deleted without it
    candidates: tuple[StepOption, ...] = ()


@dataclass(frozen=True)
class _Option:
    """A step, its plan, and the weights of the plan's saving in each table."""

    step: int
    plan: Plan
    weights: tuple[Weights, ...]  # one per table

    @property
    def per_unit(self) -> tuple[Weights, ...]:
        return tuple({at: weight / self.plan.removed for at, weight in own.items()} for own in self.weights)


def choose_step(scores: Scores, rules: Mapping[str, Any], tables: Sequence[LatencyTable]) -> tuple[Plan, Selection]:
    """The plan with the best step, and how the step was chosen.

    Args:
        scores, rules: as for `select`; multiple_of in `rules` is ignored.
        tables: of the model, at least one; one per shape, with equal weight; all for the same number of threads.

    Raises:
        UsageError: as `select` with a step of 1, or the tables are for another model.
    """
    plain = _option(scores, rules, 1, tables)
    if not plain.plan.removed:
        return plain.plan, Selection(asked="auto", multiple_of=1, reason="nothing is deleted")
    options, threads = [plain], tables[0].threads
    for step in sorted({*range(2, threads + 1), 2 * threads}):
        with suppress(UsageError):  # the floors or the ratio allow no such step
            options.append(_option(scores, rules, step, tables))
    usable = [option for option in options if not _slower(option, plain, tables)]
    best = max(usable, key=lambda option: _saved(tables, option.per_unit)[0])
    taken = next(option for option in usable if not _less(option, best, tables))
    tried = tuple(
        StepOption(multiple_of=o.step, removed=o.plan.removed, saved=_saved(tables, o.weights)[0]) for o in options
    )
    return taken.plan, _summarize(taken, plain, tables).model_copy(update={"candidates": tried})


def _option(scores: Scores, rules: Mapping[str, Any], step: int, tables: Sequence[LatencyTable]) -> _Option:
    plan = select(scores, **{**rules, "multiple_of": step})
    return _Option(step, plan, tuple(weights_of(table, plan) for table in tables))


def _summarize(taken: _Option, plain: _Option, tables: Sequence[LatencyTable]) -> Selection:
    if taken is plain:
        return Selection(asked="auto", multiple_of=1, reason="no step is better beyond the noise of the table")
    more, margin = _difference(taken.weights, plain.weights, tables)
    share = 1 - _saved(tables, taken.weights)[0]
    gain = Interval(estimate=1 + more / share, low=1 + (more - margin) / share, high=1 + (more + margin) / share)
    shown = gain.low > 1
    return Selection(
        asked="auto",
        multiple_of=taken.step,
        predicted_gain=gain,
        reason=None if shown else "no difference in latency beyond the noise of the table",
        kept_more=plain.plan.removed - taken.plan.removed,
    )


def _slower(option: _Option, plain: _Option, tables: Sequence[LatencyTable]) -> bool:
    more, margin = _difference(plain.weights, option.weights, tables)
    return more > min(margin, SLACK) + _EXACT


def _less(option: _Option, best: _Option, tables: Sequence[LatencyTable]) -> bool:
    more, margin = _difference(best.per_unit, option.per_unit, tables)
    return more > margin + _EXACT


def _saved(tables: Sequence[LatencyTable], weights: Sequence[Weights]) -> tuple[float, float]:
    """The mean saving over the shapes, and its margin."""
    each = [saved(table, own) for table, own in zip(tables, weights, strict=True)]
    return math.fsum(e for e, _ in each) / len(each), math.hypot(*(margin for _, margin in each)) / len(each)


def _difference(
    first: Sequence[Weights], second: Sequence[Weights], tables: Sequence[LatencyTable]
) -> tuple[float, float]:
    """How much more the first saves, and the margin. The error of a point that both use cancels out."""
    apart = [
        {at: a.get(at, 0.0) - b.get(at, 0.0) for at in a.keys() | b.keys()} for a, b in zip(first, second, strict=True)
    ]
    return _saved(tables, apart)
