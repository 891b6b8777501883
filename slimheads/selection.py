"""Selection: numbers in, a plan out. Pure; no model is needed.

Rules, in order:
1. A site may keep any number of units that is a multiple of `multiple_of` and at least `keep_at_least` (never below 1),
   or all of them.
2. So each site gives up its units in chunks: weakest first, ties broken by the unit's index. With `multiple_of: 1` a
   chunk is one unit.
3. The chunks of all sites are taken in ascending order of their mean score (ties: the site's place in the model) until
   floor(ratio x units) units are gone, or the next chunk would exceed that number.
4. `scope: layer` does this within each site alone. `counts: equal` also takes the same number from every site.

So plans are nested: a larger ratio removes all that a smaller one removes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from slimheads.attention import Unit
from slimheads.errors import UsageError
from slimheads.scoring import Scores, SiteScores

Scope = Literal["global", "layer"]
Normalize = Literal["none", "layer"]
Counts = Literal["any", "equal"]


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
            sites = tuple(
                SitePlan(str(s["site"]), s["unit"], int(s["total"]), tuple(int(k) for k in s["kept"]))
                for s in data["sites"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a plan: {error!r}", hint="make one with `slimheads.select` or a run") from error
        return cls(sites)


@dataclass(frozen=True)
class _Chunk:
    cost: float
    site: int
    units: tuple[int, ...]


def select(
    scores: Scores,
    ratio: float,
    scope: Scope = "global",
    normalize: Normalize = "none",
    keep_at_least: int = 1,
    multiple_of: int = 1,
    counts: Counts = "any",
) -> Plan:
    """Chooses the units to keep.

    Args:
        scores: one number a unit; the lowest go first.
        ratio: share of all units to remove, 0 <= ratio < 1; floor(ratio x units) go.
        scope: rank all units together, or each site's among themselves.
        normalize: "layer" divides a site's scores by their mean before ranking (no effect within one site).
        keep_at_least: the fewest units a site keeps.
        multiple_of: every site that gives up units keeps a multiple of this.
        counts: "equal" removes the same number from every site (all must have as many).

    Raises:
        UsageError: the ratio cannot be met under these floors, or would remove nothing although it is above 0.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"ratio {ratio} is not in [0, 1)", hint="at least one unit stays in every site")
    if keep_at_least < 1 or multiple_of < 1:
        raise UsageError("keep_at_least and multiple_of start at 1", hint="every site keeps at least one unit")
    chunks = [_chunks(index, site, normalize, keep_at_least, multiple_of) for index, site in enumerate(scores.sites)]
    totals = [len(site.scores) for site in scores.sites]
    if counts == "equal" and len(set(totals)) > 1:
        raise UsageError("counts: equal needs the same number of units in every site", hint="use counts: any")
    removed: set[tuple[int, int]] = set()
    if scope == "layer" or counts == "equal":
        for total, own in zip(totals, chunks, strict=True):
            removed |= _take(own, total, ratio)
    else:
        ranked = sorted((chunk for own in chunks for chunk in own), key=lambda c: (c.cost, c.site))
        removed = _take(ranked, sum(totals), ratio)
    if ratio > 0 and not removed:
        smallest = min(len(c.units) for own in chunks for c in own) / (
            max(totals) if scope == "layer" or counts == "equal" else sum(totals)
        )
        raise UsageError(
            f"ratio {ratio} removes nothing here",
            hint=f"the smallest ratio that removes a unit is {_ceil4(smallest)}; use 0 to change nothing",
        )
    return Plan(
        tuple(
            SitePlan(s.site, s.unit, len(s.scores), tuple(u for u in range(len(s.scores)) if (i, u) not in removed))
            for i, s in enumerate(scores.sites)
        )
    )


def _chunks(index: int, site: SiteScores, normalize: Normalize, keep_at_least: int, multiple_of: int) -> list[_Chunk]:
    total = len(site.scores)
    mean = math.fsum(site.scores) / total
    scale = mean if normalize == "layer" and mean > 0 else 1.0
    weakest_first = sorted(range(total), key=lambda unit: (site.scores[unit], unit))
    floor = math.ceil(keep_at_least / multiple_of) * multiple_of
    stops = [total, *(kept for kept in range(total - 1, 0, -1) if kept % multiple_of == 0 and kept >= floor)]
    chunks = []
    for before, after in zip(stops, stops[1:], strict=False):
        units = weakest_first[total - before : total - after]
        chunks.append(_Chunk(math.fsum(site.scores[u] for u in units) / len(units) / scale, index, tuple(units)))
    return chunks


def _take(ranked: Sequence[_Chunk], total: int, ratio: float) -> set[tuple[int, int]]:
    # The ratio as the decimal that was written: 0.29 of 100 is 29, where floating point says 28.999...
    wanted = math.floor(Fraction(str(ratio)) * total)
    possible = sum(len(chunk.units) for chunk in ranked)
    if wanted > possible:
        raise UsageError(
            f"ratio {ratio} means {wanted} of {total} units, but the floors let only {possible} go",
            hint=f"use a ratio of at most {math.floor(possible / total * 10_000) / 10_000}, or lower the floors",
        )
    taken: set[tuple[int, int]] = set()
    for chunk in ranked:
        if len(taken) + len(chunk.units) > wanted:
            break
        taken |= {(chunk.site, unit) for unit in chunk.units}
    return taken


def _ceil4(value: float) -> float:
    return math.ceil(value * 10_000) / 10_000
