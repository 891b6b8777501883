"""The latency table of a model at one shape: the cost of a site at each count of units, and of a plan.

Sites that are alike in everything that latency depends on are one *kind* (see `kinds`). For a kind and a count the
table has the share of the dense model's latency that is left when the kind has that count and all other sites are
whole. A single head of a single layer would be within the noise of a model's latency; one head of every layer is not.
Each attention or feed-forward site saves its part of that; layers are counted together. A plan saves the sum:

    share(plan) = 1 - sum over attention and feed-forward sites of (1 - share(kind, units kept)) / sites of the kind
                    - sum over layer kinds of (1 - share(kind, layers that stay))

What is inside a dropped layer is not counted again: a plan does not name it. A site that a plan does not name saves
nothing.

The margin of a prediction is that of its points, taken as independent. It shows how noisy the table is, not how well
costs add up; for that, every run compares predicted with measured latency.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, JsonValue, PositiveFloat, PositiveInt, model_validator

from slimheads.errors import UsageError
from slimheads.latency.kinds import Kind, Stored
from slimheads.latency.records import Interval
from slimheads.latency.statistics import control_fault
from slimheads.pruning.plan import Plan, SitePlan

FORMAT: Literal[2] = 2

Point = tuple[int, int]  # (index of the kind, its count)
Weights = Mapping[Point, float]


class Measurement(Stored):
    """One point: the share of the dense latency (no unit) when a kind has the count `kept`."""

    kind: int = Field(ge=0)
    kept: int = Field(ge=0)
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


class LatencyTable(Stored):
    """The points of one model at one shape; valid for what `made_for` names and nothing else."""

    format: Literal[2] = FORMAT
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


def weights_of(table: LatencyTable, plan: Plan) -> dict[Point, float]:
    """The weight of each point's saving in the saving of a plan.

    Raises:
        UsageError: the plan deletes from other sites, in other units or by other counts than the table has.
    """
    found: dict[Point, float] = {}
    for (index, count), sites in _counted(table, plan).items():
        kind = table.kinds[index]
        for at, part in kind.between(count, table.threads):
            if at < kind.total:
                found[index, at] = found.get((index, at), 0.0) + part * sites / len(kind.sites)
    return found


def _counted(table: LatencyTable, plan: Plan) -> Counter[Point]:
    """How many sites of a kind have each count, of those that lose units. The layers of a kind have one count."""
    homes = {(kind.kind, site): index for index, kind in enumerate(table.kinds) for site in kind.sites}
    found: Counter[Point] = Counter()
    dropped: Counter[int] = Counter()
    for site in plan.sites:
        if len(site.kept) == site.total:
            continue
        index = homes.get((site.kind, site.site))
        if index is None:
            raise _mismatch(f"it has no {site.kind} site {site.site}")
        if site.kind == "layer":
            dropped[index] += 1
        else:
            found[index, _kept(table.kinds[index], site)] += 1
    for index, layers in dropped.items():
        kind = table.kinds[index]
        if kind.total - layers < kind.least:
            raise _mismatch(f"{layers} of {kind.total} layers {kind.name} are dropped")
        found[index, kind.total - layers] = len(kind.sites)
    return found


def _kept(kind: Kind, site: SitePlan) -> int:
    kept = len(site.kept)
    if (site.unit, site.total) != (kind.unit, kind.total) or kept % kind.step:
        raise _mismatch(f"{site.site} keeps {kept} of {site.total} units ({site.unit})")
    return kept


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


def _mismatch(what: str) -> UsageError:
    return UsageError(f"the latency table does not fit: {what}", hint="measure one with `slimheads profile`")
