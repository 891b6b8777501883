"""What is kept: a plan, site by site, and plan.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

from pydantic import StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from slimheads.errors import UsageError
from slimheads.families.sites import Site
from slimheads.names import Unit


@dataclass(frozen=True)
class SitePlan:
    """What one site keeps: ascending indices into its `total` units."""

    site: StrictStr
    unit: Unit
    total: StrictInt
    kept: tuple[StrictInt, ...]

    def __post_init__(self) -> None:
        in_range = all(0 <= unit < self.total for unit in self.kept)
        if not self.kept or list(self.kept) != sorted(set(self.kept)) or not in_range:
            raise UsageError(
                f"kept {list(self.kept)} of {self.total} units",
                where=self.site,
                hint="a plan keeps at least one unit per site, in ascending order, without repeats",
            )

    @property
    def removed(self) -> tuple[int, ...]:
        """The deleted units, ascending."""
        return tuple(unit for unit in range(self.total) if unit not in self.kept)


@dataclass(frozen=True)
class Plan:
    """The kept units of every site, in the model's order: the contents of plan.json."""

    format: Literal[1] = field(default=1, kw_only=True)
    sites: tuple[SitePlan, ...]

    def __post_init__(self) -> None:
        names = [site.site for site in self.sites]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError("the site is planned twice", where=twice, hint="a plan names every site once")

    @property
    def total(self) -> int:
        """Units before."""
        return sum(site.total for site in self.sites)

    @property
    def removed(self) -> int:
        """Deleted units."""
        return sum(len(site.removed) for site in self.sites)

    @property
    def units(self) -> dict[str, Unit]:
        """The kind of unit of each site."""
        return {site.site: site.unit for site in self.sites}

    def to_json(self) -> dict[str, Any]:
        """The contents of plan.json."""
        return dict(_PLAN.dump_python(self, mode="json"))

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            UsageError: the data are not a plan of format 1.
        """
        try:
            # A format that is not stated is none: the default is for plans made in memory.
            return _PLAN.validate_python({"format": None, **data} if isinstance(data, Mapping) else data)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}"
            raise UsageError(f"not a plan ({what})", hint="make one with `slimheads.select` or a run") from error


_PLAN = TypeAdapter(Plan)


def match_plan(sites: Sequence[Site], plan: Plan) -> list[tuple[Site, tuple[int, ...]]]:
    """Pairs every site with its kept units. A site of KV groups that is planned by head is given by head.

    Raises:
        UsageError: the plan and the model name different sites, a site has another number of units, or its KV groups
            would keep different numbers of query heads.
    """
    planned = {s.site: s for s in plan.sites}
    unknown = planned.keys() ^ {site.name for site in sites}
    if unknown:
        raise UsageError(
            "the plan and the model do not have the same sites",
            where=min(unknown),
            hint="make the plan from this model",
        )
    pairs = []
    for site in sites:
        own = planned[site.name]
        seen = site.by_head() if own.unit == "head" else site
        if (own.total, own.unit) != (seen.total, seen.unit):
            raise UsageError(
                f"the plan counts {own.total} units ({own.unit}), the model has {seen.total} ({seen.unit})",
                where=site.name,
                hint="make the plan from this model",
            )
        if len(set(seen.kept_per_group(own.kept).values())) > 1:
            raise UsageError(
                f"the plan keeps heads {list(own.kept)}: not as many in each KV group",
                where=site.name,
                hint="keep the same number of query heads for every KV head",
            )
        pairs.append((seen, own.kept))
    return pairs
