"""`multiple_of: auto` and `ffn_multiple_of: auto`: the step of counts that saves most per unit, by latency tables.

Rules:
1. For heads the steps 1, 2, ... up to the number of threads, and twice that, are tried; for neurons 1, 8, 16 and 32,
   the alignments that the table tells apart. Steps that the other rules of `select` forbid are left out. Each has the
   plan that `select` makes with it, so that the other layers give up what one layer may not.
2. Steps are compared by the predicted saving per deleted unit of their kind, because not every step deletes the same
   number.
3. A step must not be slower than the plan without a step by more than the table's margin or by more than SLACK.
4. Of all steps within the table's margin of the best, the smallest is taken.
5. Each kind is ranked among itself, so one step does not depend on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from slimheads.errors import UsageError
from slimheads.latency.kinds import ALIGNMENTS
from slimheads.latency.records import Interval
from slimheads.latency.table import LatencyTable, Weights, saved, weights_of
from slimheads.names import SiteKind
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import Scores
from slimheads.pruning.select import select

SLACK = 0.01  # of the dense latency
FEWEST_NEURONS = 32  # that a block keeps where the step is auto: cutting a block to almost nothing costs too much
_KEYS: Mapping[SiteKind, str] = {"attention": "multiple_of", "feed_forward": "ffn_multiple_of"}
_EXACT = 1e-9  # rounding error of a tie


class StepOption(BaseModel):
    """A step that was tried."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    multiple_of: int
    removed: int  # units
    saved: float  # predicted share of the dense latency, the mean over the shapes


class Selection(BaseModel):
    """The step that the counts of one kind of sites are a multiple of, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    asked: int | Literal["auto"]
    multiple_of: int
    predicted_gain: Interval | None = None  # predicted latency without a step / with it; mean over the shapes
    reason: str | None = None  # why there is no gain
    kept_more: int = 0  # units kept with the step and deleted without it
    candidates: tuple[StepOption, ...] = ()
    feed_forward: Selection | None = None  # beside the step of heads, that of neurons; null where none are deleted

    @property
    def steps(self) -> dict[str, int]:
        """The steps, and the floor that goes with one chosen here, as arguments of `select`."""
        found, neurons = {"multiple_of": self.multiple_of}, self.feed_forward
        if neurons:
            found["ffn_multiple_of"] = neurons.multiple_of
            if neurons.asked == "auto":
                found["ffn_keep_at_least"] = FEWEST_NEURONS
        return found


@dataclass(frozen=True)
class _Option:
    """A step, and the weights of its plan's saving in each table: of all sites, and of those of the kind alone."""

    step: int
    removed: int  # units of the kind
    weights: tuple[Weights, ...]  # one per table
    own: tuple[Weights, ...]

    @property
    def per_unit(self) -> tuple[Weights, ...]:
        return tuple({at: weight / self.removed for at, weight in own.items()} for own in self.own)


def choose_steps(scores: Scores, rules: Mapping[str, Any], tables: Sequence[LatencyTable]) -> tuple[Plan, Selection]:
    """The plan with the best step where the rules say auto, and how the steps were chosen.

    Args:
        scores, rules: as for `select`.
        tables: of the model, at least one where a step is auto; one per shape, with equal weight; all for the same
            number of threads.

    Raises:
        UsageError: as `select` with a step of 1, or the tables are for another model.
    """
    if not tables:
        select(scores, **rules)  # refuses auto
    rules = {"multiple_of": 1, "ffn_ratio": 0.0, "ffn_multiple_of": 32, **rules}
    settled = {**rules, **{key: 1 for key in _KEYS.values() if rules[key] == "auto"}}
    if rules["ffn_multiple_of"] == "auto":
        settled["ffn_keep_at_least"] = FEWEST_NEURONS
    found: dict[SiteKind, Selection] = {}
    for kind, key in _KEYS.items():
        asked = rules[key]
        auto = asked == "auto"
        found[kind] = _best_step(scores, settled, tables, kind) if auto else Selection(asked=asked, multiple_of=asked)
        settled[key] = found[kind].multiple_of
    neurons = found["feed_forward"] if rules["ffn_ratio"] or rules["ffn_multiple_of"] == "auto" else None
    return select(scores, **settled), found["attention"].model_copy(update={"feed_forward": neurons})


def _best_step(scores: Scores, rules: Mapping[str, Any], tables: Sequence[LatencyTable], kind: SiteKind) -> Selection:
    plain = _option(scores, rules, 1, tables, kind)
    if not plain.removed:
        return Selection(asked="auto", multiple_of=1, reason="nothing is deleted")
    options = [plain]
    for step in _steps(kind, tables[0].threads):
        with suppress(UsageError):  # the floors or the ratio allow no such step
            options.append(_option(scores, rules, step, tables, kind))
    usable = [option for option in options if not _slower(option, plain, tables)]
    best = max(usable, key=lambda option: _saved(tables, option.per_unit)[0])
    taken = next(option for option in usable if not _less(option, best, tables))
    tried = tuple(StepOption(multiple_of=o.step, removed=o.removed, saved=_saved(tables, o.own)[0]) for o in options)
    return _summarize(taken, plain, tables).model_copy(update={"candidates": tried})


def _steps(kind: SiteKind, threads: int) -> Sequence[int]:
    return ALIGNMENTS if kind == "feed_forward" else sorted({*range(2, threads + 1), 2 * threads})


def _option(
    scores: Scores, rules: Mapping[str, Any], step: int, tables: Sequence[LatencyTable], kind: SiteKind
) -> _Option:
    plan = select(scores, **{**rules, _KEYS[kind]: step})
    weights = tuple(weights_of(table, plan) for table in tables)
    own = tuple(
        {at: weight for at, weight in each.items() if table.kinds[at[0]].kind == kind}
        for table, each in zip(tables, weights, strict=True)
    )
    removed = sum(site.total - len(site.kept) for site in plan.sites if site.kind == kind)
    return _Option(step, removed, weights, own)


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
        kept_more=plain.removed - taken.removed,
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
