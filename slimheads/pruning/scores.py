"""One score per unit of each site, and scores.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.dataclasses import dataclass

from slimheads.families.sites import SiteKey
from slimheads.names import SiteKind, Unit
from slimheads.pruning.plan import Plan


@dataclass(frozen=True)
class SiteScores:
    """The scores of one site, one per unit, in the site's order.

    For KV groups `query_heads` holds the scores of the query heads as well: one row per group, one column per member.
    """

    site: str
    unit: Unit
    scores: tuple[float, ...]
    query_heads: tuple[tuple[float, ...], ...] = ()
    kind: SiteKind = "attention"

    @property
    def key(self) -> SiteKey:
        """Kind and name."""
        return self.kind, self.site

    def by_head(self) -> SiteScores:
        """The scores of the query heads alone; itself where there are no KV groups."""
        if self.unit != "kv_group":
            return self
        return SiteScores(self.site, "head", tuple(score for group in self.query_heads for score in group))


@dataclass(frozen=True)
class Scores:
    """The scores of a model's sites, in the model's order."""

    method: str
    sites: tuple[SiteScores, ...]

    def of_kinds(self, *kinds: SiteKind) -> Scores:
        """Those of the sites of some kinds."""
        return Scores(self.method, tuple(site for site in self.sites if site.kind in kinds))

    def behind(self, plan: Plan) -> Scores:
        """Those of the sites that a plan names, of its units: of query heads where it is by head."""
        units = {site.key: site.unit for site in plan.sites}
        own = (site for site in self.sites if site.key in units)
        return Scores(self.method, tuple(s.by_head() if units[s.key] == "head" else s for s in own))

    def table(self) -> ScoreTable:
        """The contents of scores.json."""
        rows = (SiteRow(site=s.site, kind=s.kind, unit=s.unit, scores=s.scores) for s in self.sites)
        return ScoreTable(method=self.method, sites=tuple(rows))


class SiteRow(BaseModel):
    """Scores of one site's units, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    site: str
    kind: SiteKind
    unit: Unit
    scores: tuple[float, ...]


class ScoreTable(BaseModel):
    """The contents of scores.json, format 2."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    format: Literal[2] = 2
    method: str
    sites: tuple[SiteRow, ...]
