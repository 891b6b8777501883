"""One score per unit of each site, and scores.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from slimheads.names import Unit


@dataclass(frozen=True)
class SiteScores:
    """The scores of one site, one a unit, in the site's order.

    For KV groups `query_heads` holds the scores of the query heads as well: a row a group, a column a member.
    """

    site: str
    unit: Unit
    scores: tuple[float, ...]
    query_heads: tuple[tuple[float, ...], ...] = ()

    def by_head(self) -> SiteScores:
        """The scores of the query heads alone; itself where the units are heads already."""
        if self.unit == "head":
            return self
        return SiteScores(self.site, "head", tuple(score for group in self.query_heads for score in group))


@dataclass(frozen=True)
class Scores:
    """The scores of a model's sites, in the model's order."""

    method: str
    sites: tuple[SiteScores, ...]

    def to_json(self) -> dict[str, Any]:
        """The contents of scores.json."""
        sites = [{"site": s.site, "scores": list(s.scores)} for s in self.sites]
        return {"format": 1, "method": self.method, "sites": sites}

    def in_units(self, units: Mapping[str, Unit]) -> Scores:
        """The same with the scores of the query heads at those sites that are planned by head."""
        return replace(self, sites=tuple(s.by_head() if units[s.site] == "head" else s for s in self.sites))

    def to_record(self) -> dict[str, Any]:
        """Everything, for a later run; scores.json leaves the units out."""
        return {"method": self.method, "sites": [asdict(site) for site in self.sites]}

    @classmethod
    def from_record(cls, data: dict[str, Any]) -> Scores:
        """Reads what `to_record` wrote."""
        sites = (
            SiteScores(s["site"], s["unit"], tuple(s["scores"]), tuple(tuple(group) for group in s["query_heads"]))
            for s in data["sites"]
        )
        return cls(data["method"], tuple(sites))
