"""The latency table of a model at one shape: what a site costs at each count of units, and what a plan will cost.

Sites that are alike in everything that latency depends on are one *kind*. For a kind and a count the table holds the
share of the dense model's latency that is left when every site of the kind keeps that many units and all others are
whole: a single head of a single layer is lost in the noise of a whole model's latency, a head of every layer is not.
What one site saves is its part of that, and what a plan saves is the sum over its sites:

    share(plan) = 1 - sum over sites of (1 - share(kind, kept)) / sites of the kind

Its margin is that of the points it is made of, taken as independent of each other. It says how noisy the table was,
not how well costs add up: that is what predicted against measured shows in every run.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveFloat, PositiveInt, model_validator
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.sites import Site, find_sites, linear_features
from slimheads.latency.records import Interval
from slimheads.latency.statistics import control_fault
from slimheads.names import Unit
from slimheads.pruning.plan import Plan, SitePlan

FORMAT: Literal[1] = 1
MEASURED = 16  # counts of a kind that are measured, about; all of them where there are no more
_PER_RESIDUE = 3  # at least, for each remainder of a count by the number of threads

Point = tuple[int, int]  # (kind's index, units that each of its sites keeps)
Weights = Mapping[Point, float]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kind(_Stored):
    """Sites that cost the same at the same count."""

    name: str  # what their names have in common, * for an index
    unit: Unit
    total: PositiveInt
    step: PositiveInt  # units that go together: one of each KV group, or 1
    sites: tuple[str, ...] = Field(min_length=1)

    def counts(self, threads: int) -> tuple[int, ...]:
        """The counts that are measured, ascending."""
        return measured_counts(self.total, self.step, threads)

    def keeping(self, count: int) -> tuple[int, ...]:
        """Which units stay when `count` do: the first, or the first of each group."""
        members = self.total // self.step
        return tuple(group * members + member for group in range(self.step) for member in range(count // self.step))


class Measurement(_Stored):
    """One point: the share of the dense latency (no unit) when every site of a kind keeps `kept` units."""

    kind: int = Field(ge=0)
    kept: PositiveInt
    share: Interval
    control: Interval  # dense against dense, measured along with it

    @property
    def doubt(self) -> str | None:
        """Why the control cannot vouch for it, or None where it does."""
        return control_fault(self.control)

    @property
    def margin(self) -> float:
        """Half the width of the 95% interval; where there is doubt, no less than the control was off."""
        half = (self.share.high - self.share.low) / 2
        return max(half, abs(self.control.low - 1), abs(self.control.high - 1)) if self.doubt else half


class LatencyTable(_Stored):
    """Everything measured of one model at one shape; valid for what `made_for` names and nothing else."""

    format: Literal[1] = FORMAT
    made_for: dict[str, JsonValue]
    provider: str
    threads: PositiveInt
    shape: tuple[int, ...]
    min_seconds: PositiveFloat  # a point
    dense_ms: PositiveFloat
    kinds: tuple[Kind, ...]
    points: tuple[Measurement, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        wanted = [(index, count) for index, kind in enumerate(self.kinds) for count in kind.counts(self.threads)]
        if [(point.kind, point.kept) for point in self.points] != wanted:
            raise ValueError("the points are not those of the kinds")
        ratios = [ratio for point in self.points for ratio in (point.share, point.control)]
        if not all(0 < value < math.inf for ratio in ratios for value in (ratio.low, ratio.estimate, ratio.high)):
            raise ValueError("a ratio of latencies is not a number above 0")
        return self

    @property
    def doubtful(self) -> int:
        """How many points have a control that does not vouch for them."""
        return sum(point.doubt is not None for point in self.points)

    def fingerprint(self) -> str:
        """SHA-256 of the content, in hex."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Predicted:
    """What a table says of a plan: slim latency in milliseconds, and dense / slim with the table's own margin."""

    dense_ms: float
    slim_ms: float
    speedup: Interval


def measured_counts(total: int, step: int, threads: int) -> tuple[int, ...]:
    """The counts below `total` that are measured, ascending.

    A count's remainder by the number of threads decides how evenly its heads are shared out, so that latency is a
    staircase. Where there are too many counts, each remainder gets as many, its lowest and highest among them: counts
    between are read off their own remainder, and the stairs survive.
    """
    residues: dict[int, list[int]] = {}
    for count in range(step, total, step):
        residues.setdefault(count % threads, []).append(count)
    each = max(_PER_RESIDUE, math.ceil(MEASURED / max(1, len(residues))))
    return tuple(sorted(count for alike in residues.values() for count in _spread(alike, each)))


def _spread(counts: Sequence[int], wanted: int) -> set[int]:
    if len(counts) <= wanted:
        return set(counts)
    return {counts[round(place * (len(counts) - 1) / (wanted - 1))] for place in range(wanted)}


def kinds_of(model: PreTrainedModel, within_groups: bool = False) -> tuple[Kind, ...]:
    """The kinds of a model's sites, in the model's order.

    Alike are sites whose names differ in indices alone and whose units, head size, projections (both sizes of each) and
    tables are the same. A layer's other parts do not matter: they cost the same in the dense model and in the slim one.

    Args:
        within_groups: count query heads where they share KV heads, one of each group at a time.
    """
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in find_sites(model):
        own = site.name + "."
        projections = tuple(
            (p.module.removeprefix(own), *linear_features(model.get_submodule(p.module))) for p in site.projections
        )
        tables = tuple((t.module.removeprefix(own), t.name, t.entries) for t in site.tables)
        alike.setdefault((_pattern(site), site.unit, site.total, site.head_dim, projections, tables), []).append(site)
    return tuple(_kind(sites, within_groups) for sites in alike.values())


def _pattern(site: Site) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.name)


def _kind(sites: Sequence[Site], within_groups: bool) -> Kind:
    first = sites[0]
    seen = first.by_head() if within_groups else first
    step = first.total if seen.unit != first.unit else 1
    names = tuple(site.name for site in sites)
    return Kind(name=_pattern(first), unit=seen.unit, total=seen.total, step=step, sites=names)


def plan_keeping(kinds: Sequence[Kind], chosen: int, count: int) -> Plan:
    """The plan of a point: every site of the kind with the index `chosen` keeps `count` units, all others are whole."""
    return Plan(
        tuple(
            SitePlan(site, kind.unit, kind.total, kind.keeping(count if index == chosen else kind.total))
            for index, kind in enumerate(kinds)
            for site in kind.sites
        )
    )


# Prediction


def weights_of(table: LatencyTable, plan: Plan) -> dict[Point, float]:
    """How much of each point's saving is in what a plan saves.

    Raises:
        UsageError: the plan is for other sites, other units or other counts than the table.
    """
    homes = {site: index for index, kind in enumerate(table.kinds) for site in kind.sites}
    if homes.keys() != {site.site for site in plan.sites}:
        raise _mismatch("the plan names other sites")
    found: dict[Point, float] = {}
    for site in plan.sites:
        index = homes[site.site]
        kind, kept = table.kinds[index], len(site.kept)
        if (site.unit, site.total) != (kind.unit, kind.total) or kept % kind.step:
            raise _mismatch(f"{site.site} keeps {kept} of {site.total} units ({site.unit})")
        for count, part in _between(kept, (*kind.counts(table.threads), kind.total), table.threads):
            if count < kind.total:
                point = (index, count)
                found[point] = found.get(point, 0.0) + part / len(kind.sites)
    return found


def saved(table: LatencyTable, weights: Weights) -> tuple[float, float]:
    """What is saved of the dense latency, as a share of it, and its margin (95%)."""
    points = {(point.kind, point.kept): point for point in table.points}
    estimate = math.fsum(weight * (1 - points[at].share.estimate) for at, weight in weights.items())
    return estimate, math.hypot(*(weight * points[at].margin for at, weight in weights.items()))


def predict(table: LatencyTable, plan: Plan) -> Predicted:
    """The latency of a plan at the table's shape.

    Raises:
        UsageError: the plan is not one for the table.
    """
    gain, margin = saved(table, weights_of(table, plan))
    share = 1 - gain
    if share <= 0:
        raise _mismatch("the costs of the plan's sites add up to more than the model")
    # On the log scale, where no margin makes a latency negative.
    low, high = (math.exp(sign * margin / share) / share for sign in (-1, 1))
    speedup = Interval(estimate=1 / share, low=low, high=high)
    return Predicted(dense_ms=table.dense_ms, slim_ms=table.dense_ms * share, speedup=speedup)


def _between(kept: int, measured: Sequence[int], threads: int) -> list[tuple[int, float]]:
    """The measured counts that stand for a count, with their parts: itself, or its neighbours of the same remainder."""
    if kept in measured:
        return [(kept, 1.0)]
    alike = [count for count in measured if count % threads == kept % threads]
    below, above = max(c for c in alike if c < kept), min(c for c in alike if c > kept)
    part = (kept - below) / (above - below)
    return [(below, 1 - part), (above, part)]


def _mismatch(what: str) -> UsageError:
    return UsageError(f"the latency table does not fit: {what}", hint="measure one with `slimheads profile`")
