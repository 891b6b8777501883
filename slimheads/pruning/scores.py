"""One score per unit of each site, and scores.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.dataclasses import dataclass

from slimheads.names import Unit


@dataclass(frozen=True)
class SiteScores:
    """The scores of one site, one per unit, in the site's order.

    For KV groups `query_heads` holds the scores of the query heads as well: one row per group, one column per member.
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

    def in_units(self, units: Mapping[str, Unit]) -> Scores:
        """The same with the scores of the query heads at those sites that are planned by head."""
        return replace(self, sites=tuple(s.by_head() if units[s.site] == "head" else s for s in self.sites))

    def table(self) -> ScoreTable:
        """The contents of scores.json."""
        return ScoreTable(method=self.method, sites=tuple(SiteRow(site=s.site, scores=s.scores) for s in self.sites))


class SiteRow(BaseModel):
    """Scores of one site's units, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    site: str
    scores: tuple[float, ...]


class ScoreTable(BaseModel):
    """The contents of scores.json, format 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    format: Literal[1] = 1
    method: str
    sites: tuple[SiteRow, ...]
