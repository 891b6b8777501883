"""What is kept: a plan, site by site, and plan.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from slimheads.errors import UsageError
from slimheads.families.sites import Site
from slimheads.names import Unit


@dataclass(frozen=True)
class SitePlan:
    """What one site keeps: ascending indices into its `total` units."""

    site: str
    unit: Unit
    total: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        in_range = all(0 <= unit < self.total for unit in self.kept)
        if not self.kept or list(self.kept) != sorted(set(self.kept)) or not in_range:
            raise UsageError(
                f"kept {list(self.kept)} of {self.total} units",
                where=self.site,
                hint="a plan keeps at least one unit a site, in ascending order, without repeats",
            )

    @property
    def removed(self) -> tuple[int, ...]:
        """The units that go, ascending."""
        return tuple(unit for unit in range(self.total) if unit not in self.kept)


@dataclass(frozen=True)
class Plan:
    """The kept units of every site, in the model's order."""

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
        """Units that go."""
        return sum(len(site.removed) for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """The contents of plan.json."""
        return {
            "format": 1,
            "sites": [{"site": s.site, "unit": s.unit, "total": s.total, "kept": list(s.kept)} for s in self.sites],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            UsageError: the data is not a plan of format 1.
        """
        try:
            if data["format"] != 1:
                raise ValueError(f"format {data['format']!r}")
            sites = tuple(_site_from_json(site) for site in data["sites"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a plan: {error!r}", hint="make one with `slimheads.select` or a run") from error
        return cls(sites)


def _site_from_json(data: dict[str, Any]) -> SitePlan:
    site, unit, total, kept = data["site"], data["unit"], data["total"], data["kept"]
    if not isinstance(site, str) or unit not in get_args(Unit) or not isinstance(kept, list):
        raise ValueError(f"site {site!r}, unit {unit!r}, kept {kept!r}")
    if any(type(number) is not int for number in (total, *kept)):
        raise ValueError(f"{site} counts in something other than whole numbers")
    return SitePlan(site, unit, total, tuple(kept))


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
