"""What is kept: a plan, site by site, and plan.json."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)
from pydantic.dataclasses import dataclass

from slimheads.errors import UsageError
from slimheads.families.record import Range, Renumbering, in_ranges, out_of_ranges
from slimheads.families.sites import Site, SiteKey
from slimheads.names import UNITS, SiteKind, Unit

Total = Annotated[int, Field(strict=True, ge=1, le=2**24)]  # the bound keeps a forged plan's ranges from filling memory


@dataclass(frozen=True)
class SitePlan:
    """What one site keeps: ascending indices into its `total` units. Of a layer that goes, nothing."""

    site: StrictStr
    unit: Unit
    total: Total
    kept: tuple[StrictInt, ...]
    kind: SiteKind = "attention"

    @field_validator("kept", mode="before")
    @classmethod
    def _without_ranges(cls, kept: Any, info: ValidationInfo) -> Any:
        if not isinstance(kept, list) or all(type(item) is int for item in kept):  # a tuple was made in memory
            return kept
        return tuple(out_of_ranges(kept, info.data.get("total", 0)))

    def __post_init__(self) -> None:
        if self.unit not in UNITS[self.kind]:
            what = f"a site of kind {self.kind} has no units of {self.unit}"
            raise UsageError(what, where=self.site, hint=f"its units are {' or '.join(UNITS[self.kind])}s")
        in_range = not self.kept or (self.kept[0] >= 0 and self.kept[-1] < self.total)
        ascending = all(map(operator.lt, self.kept, self.kept[1:]))
        if not (ascending and in_range) or not (self.kept or self.kind == "layer"):
            raise UsageError(
                f"kept {in_ranges(self.kept)} of {self.total} units",
                where=self.site,
                hint="a plan keeps at least one unit per block, in ascending order, without repeats",
            )

    @property
    def key(self) -> SiteKey:
        """Kind and name."""
        return self.kind, self.site

    @property
    def removed(self) -> tuple[int, ...]:
        """The deleted units, ascending."""
        kept = set(self.kept)
        return tuple(unit for unit in range(self.total) if unit not in kept)

    @field_serializer("kept")
    def _in_ranges(self, kept: tuple[int, ...]) -> list[Range]:
        """Neurons are many, so they are written as ranges."""
        return in_ranges(kept) if self.unit == "neuron" else list(kept)


@dataclass(frozen=True)
class Plan:
    """The kept units of the sites that it names, in the model's order: the contents of plan.json.

    A site that a plan does not name is untouched, unless it is in a layer that the plan drops.
    """

    format: Literal[2] = field(default=2, kw_only=True)
    sites: tuple[SitePlan, ...]

    def __post_init__(self) -> None:
        keys = [site.key for site in self.sites]
        if len(set(keys)) < len(keys):
            twice = next(name for key in keys if keys.count(key) > 1 for name in key[1:])
            raise UsageError("the site is planned twice", where=twice, hint="a plan names every site once")
        layers = self.renumbering
        inside = next((s for s in self.sites if s.kind != "layer" and layers.drops(s.site)), None)
        if inside:
            raise UsageError(
                "the site is in a layer that the plan drops",
                where=inside.site,
                hint="name the layer alone: what is inside goes with it",
            )

    @property
    def renumbering(self) -> Renumbering:
        """How the layers that stay are renumbered."""
        return Renumbering.without(s.site for s in self.sites if s.kind == "layer" and not s.kept)

    @property
    def total(self) -> int:
        """Units before, of all kinds."""
        return sum(site.total for site in self.sites)

    @property
    def removed(self) -> int:
        """Deleted units, of all kinds."""
        return sum(site.total - len(site.kept) for site in self.sites)

    @property
    def kinds(self) -> tuple[SiteKind, ...]:
        """The kinds of the sites that it names."""
        return tuple(dict.fromkeys(site.kind for site in self.sites))

    def of_kind(self, kind: SiteKind) -> Plan:
        """What it says of the sites of one kind."""
        return Plan(tuple(site for site in self.sites if site.kind == kind))

    def to_json(self) -> dict[str, Any]:
        """The contents of plan.json."""
        return dict(_PLAN.dump_python(self, mode="json"))

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Reads what `to_json` wrote, or a plan of format 1, which has attention alone and no `kind`.

        Raises:
            UsageError: the data are not a plan of format 1 or 2.
        """
        try:
            return _PLAN.validate_python(_as_format_2(data))
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}"
            raise UsageError(f"not a plan ({what})", hint="make one with `slimheads.select` or a run") from error


_PLAN = TypeAdapter(Plan)


def _as_format_2(data: object) -> object:
    """A format that is not stated is none, and a site of format 2 without a kind has none: the defaults of the classes
    are for plans made in memory.
    """
    if not isinstance(data, Mapping):
        return data
    sites, old = data.get("sites"), type(data.get("format")) is int and data.get("format") == 1
    if isinstance(sites, list | tuple) and all(isinstance(site, Mapping) for site in sites):
        if old and any("kind" in site for site in sites):
            return {**data, "format": "1 with kinds"}
        sites = [{"kind": "attention" if old else None, **site} for site in sites]
    return {"format": None, **data, "sites": sites} | ({"format": 2} if old else {})


@plain_dataclass(frozen=True)
class Matched:
    """A plan beside the sites of the model that it was made for."""

    pairs: tuple[tuple[Site, tuple[int, ...]], ...]  # attention and feed-forward sites that stay, and their kept units
    dropped: tuple[Site, ...]  # layers
    renumbering: Renumbering

    def of_attention(self) -> list[tuple[Site, tuple[int, ...]]]:
        """The pairs of attention sites."""
        return [pair for pair in self.pairs if pair[0].kind == "attention"]


def match_plan(sites: Sequence[Site], plan: Plan) -> Matched:
    """Pairs every site with its kept units: all where the plan does not name it.

    A site of KV groups that is planned by head is given by head.

    Raises:
        UsageError: the plan names a site that the model does not have, a site has another number of units, its KV
            groups would keep different numbers of query heads, or a layer cannot be dropped.
    """
    planned = {s.key: s for s in plan.sites}
    unknown = planned.keys() - {site.key for site in sites}
    if unknown:
        raise UsageError(
            f"the model has no such site of kind {min(unknown)[0]}",
            where=min(unknown)[1],
            hint="make the plan from this model",
        )
    pairs, dropped = [], []
    for site in sites:
        seen, kept = _kept_of(site, planned.get(site.key))
        if site.kind != "layer":
            pairs.append((seen, kept))
        elif not kept:
            dropped.append(site)
    _require_droppable(dropped, sites)
    layers = plan.renumbering
    return Matched(tuple(pair for pair in pairs if not layers.drops(pair[0].name)), tuple(dropped), layers)


def _kept_of(site: Site, planned: SitePlan | None) -> tuple[Site, tuple[int, ...]]:
    if planned is None:
        return site, tuple(range(site.total))
    seen = site.by_head() if planned.unit == "head" else site
    if (planned.total, planned.unit) != (seen.total, seen.unit):
        raise UsageError(
            f"the plan counts {planned.total} units ({planned.unit}), the model has {seen.total} ({seen.unit})",
            where=site.name,
            hint="make the plan from this model",
        )
    if site.kind == "attention" and len(set(seen.kept_per_group(planned.kept).values())) > 1:
        raise UsageError(
            f"the plan keeps heads {list(planned.kept)}: not as many in each KV group",
            where=site.name,
            hint="keep the same number of query heads for every KV head",
        )
    return seen, planned.kept


def _require_droppable(dropped: Sequence[Site], sites: Sequence[Site]) -> None:
    for site in dropped:
        if site.stays:
            raise UsageError(
                f"the layer cannot be dropped, because {site.stays}", where=site.name, hint="drop another layer"
            )
        alike = [other for other in sites if other.kind == "layer" and other.stack == site.stack]
        if len(alike) == sum(other.stack == site.stack for other in dropped):
            raise UsageError(
                f"the plan drops all {len(alike)} layers", where=site.stack, hint="at least one layer stays"
            )
