"""The latency table of a model at one shape: the cost of a site at each count of units, and of a plan.

Sites that are alike in everything that latency depends on are one *kind*. For a kind and a count the table has the
share of the dense model's latency that is left when every site of the kind keeps that many units and all others are
whole. A single head of a single layer would be within the noise of a model's latency; one head of every layer is not.
Each site saves its part of that, and a plan saves the sum over its sites:

    share(plan) = 1 - sum over sites of (1 - share(kind, kept)) / sites of the kind

The margin of a prediction is that of its points, taken as independent. It shows how noisy the table is, not how well
costs add up; for that, every run compares predicted with measured latency.
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
from slimheads.families.sites import Site, find_sites, linear_features, of_kind
from slimheads.latency.records import Interval
from slimheads.latency.statistics import control_fault
from slimheads.names import Unit
from slimheads.pruning.plan import Plan, SitePlan

FORMAT: Literal[1] = 1
MEASURED = 16  # about so many counts of a kind are measured, or all where there are fewer
_PER_RESIDUE = 3  # least number of counts measured for each remainder by the number of threads

Point = tuple[int, int]  # (index of the kind, units that each of its sites keeps)
Weights = Mapping[Point, float]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kind(_Stored):
    """Sites that cost the same at the same count."""

    name: str  # the sites' name with * for each index
    unit: Unit
    total: PositiveInt
    step: PositiveInt  # units that go together: one of each KV group, or 1
    sites: tuple[str, ...] = Field(min_length=1)

    def counts(self, threads: int) -> tuple[int, ...]:
        """The counts that are measured, ascending."""
        return measured_counts(self.total, self.step, threads)

    def keeping(self, count: int) -> tuple[int, ...]:
        """The units that stay when `count` do: the first ones, or the first ones of each group."""
        members = self.total // self.step
        return tuple(group * members + member for group in range(self.step) for member in range(count // self.step))


class Measurement(_Stored):
    """One point: the share of the dense latency (no unit) when every site of a kind keeps `kept` units."""

    kind: int = Field(ge=0)
    kept: PositiveInt
    share: Interval
    control: Interval  # dense against dense, measured along with it

    @property
    def noise(self) -> str | None:
        """Why the control is too noisy, or None where it is not."""
        return control_fault(self.control)

    @property
    def margin(self) -> float:
        """Half the width of the 95% interval; with a noisy control, at least as far as its interval reaches from 1."""
        half = (self.share.high - self.share.low) / 2
        return max(half, abs(self.control.low - 1), abs(self.control.high - 1)) if self.noise else half


class LatencyTable(_Stored):
    """The points of one model at one shape; valid for what `made_for` names and nothing else."""

    format: Literal[1] = FORMAT
    made_for: dict[str, JsonValue]
    provider: str
    threads: PositiveInt
    shape: tuple[int, ...]
    min_seconds: PositiveFloat  # per point
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
    def noisy_points(self) -> int:
        """How many points have a noisy control."""
        return sum(point.noise is not None for point in self.points)

    def fingerprint(self) -> str:
        """SHA-256 of the content, in hex."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Predicted:
    """A table's prediction of a plan: slim latency in milliseconds, and dense / slim with the table's margin."""

    dense_ms: float
    slim_ms: float
    speedup: Interval


def measured_counts(total: int, step: int, threads: int) -> tuple[int, ...]:
    """The counts below `total` that are measured, ascending.

    A count's remainder by the number of threads decides how evenly heads are distributed over them, so latency is a
    step function. Where not all counts are measured, each remainder gets the same number, its lowest and highest among
    them; the counts between are interpolated within their remainder, which keeps the steps.
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

    Sites are alike if their names differ only in indices and their units, head size, projections (both sizes of each)
    and tables are the same. The other parts of a layer cost the same in the dense model and in the slim one.

    Args:
        within_groups: count query heads where they share KV heads, one of each group at a time.
    """
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in of_kind(find_sites(model), "attention"):
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
    """The plan of a point: every site of the kind at index `chosen` keeps `count` units, all others are whole."""
    return Plan(
        tuple(
            SitePlan(site, kind.unit, kind.total, kind.keeping(count if index == chosen else kind.total))
            for index, kind in enumerate(kinds)
            for site in kind.sites
        )
    )


def weights_of(table: LatencyTable, plan: Plan) -> dict[Point, float]:
    """The weight of each point's saving in the saving of a plan.

    Raises:
        UsageError: the plan has other sites, other units or other counts than the table.
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
    """The saving as a share of the dense latency, and its margin (95%)."""
    points = {(point.kind, point.kept): point for point in table.points}
    estimate = math.fsum(weight * (1 - points[at].share.estimate) for at, weight in weights.items())
    return estimate, math.hypot(*(weight * points[at].margin for at, weight in weights.items()))


def predict(table: LatencyTable, plan: Plan) -> Predicted:
    """The latency of a plan at the table's shape.

    Raises:
        UsageError: the plan does not fit the table.
    """
    gain, margin = saved(table, weights_of(table, plan))
    share = 1 - gain
    if share <= 0:
        raise _mismatch("the costs of the plan's sites add up to more than the model")
    # On the log scale, so that no margin makes a latency negative.
    low, high = (math.exp(sign * margin / share) / share for sign in (-1, 1))
    speedup = Interval(estimate=1 / share, low=low, high=high)
    return Predicted(dense_ms=table.dense_ms, slim_ms=table.dense_ms * share, speedup=speedup)


def _between(kept: int, measured: Sequence[int], threads: int) -> list[tuple[int, float]]:
    """The measured counts that a count is interpolated from, with their weights; neighbours of the same remainder."""
    if kept in measured:
        return [(kept, 1.0)]
    alike = [count for count in measured if count % threads == kept % threads]
    below, above = max(c for c in alike if c < kept), min(c for c in alike if c > kept)
    part = (kept - below) / (above - below)
    return [(below, 1 - part), (above, part)]


def _mismatch(what: str) -> UsageError:
    return UsageError(f"the latency table does not fit: {what}", hint="measure one with `slimheads profile`")
