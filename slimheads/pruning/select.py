"""Selection: from scores to a plan. A pure function; no model is needed.

Rules, in order:
1. A site may keep any number of units that is a multiple of `multiple_of` and at least `keep_at_least` (never below 1),
   or all of them.
2. So units are removed from a site in chunks: lowest score first, ties broken by the unit's index. With
   `multiple_of: 1` a chunk is one unit.
3. The chunks of all sites are removed in ascending order of their mean score (ties: the site's place in the model),
   until floor(ratio x units) units are removed or the next chunk would exceed that number.
4. `scope: layer` ranks each site alone. `counts: equal` also removes the same number of units from every site.
5. `within_groups` removes query heads instead of KV groups: each step removes the lowest head of each group of a site.
6. Sites whose name does not match the glob `sites` lose nothing and are not counted.

So plans are nested: a larger ratio removes all that a smaller one removes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate, count, pairwise
from typing import Any, get_args

from slimheads.errors import UsageError, require_known
from slimheads.names import Counts, Normalize, Scope, Unit
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.scores import Scores, SiteScores

_FLOORS_TOO_HIGH = "lower keep_at_least or multiple_of, which allow no removal at any ratio, or use ratio 0"
_ONE_HEAD_PER_BLOCK = "every attention block has one head, which is kept: use ratio 0"


@dataclass(frozen=True)
class _Removable:
    """A site, the order in which its units would be removed, and how many are removed in one step."""

    index: int
    site: str
    unit: Unit
    scores: tuple[float, ...]
    order: tuple[int, ...]
    step: int

    @property
    def total(self) -> int:
        return len(self.scores)

    @classmethod
    def of(cls, index: int, site: SiteScores, within_groups: bool) -> _Removable:
        if not (within_groups and site.query_heads):
            order = _ascending(site.scores)
            return cls(index, site.site, site.unit, site.scores, tuple(order), 1)
        members = len(site.query_heads[0])
        ranked = [[g * members + m for m in _ascending(group)] for g, group in enumerate(site.query_heads)]
        order = [unit for step in zip(*ranked, strict=True) for unit in step]
        return cls(index, site.site, "head", site.by_head().scores, tuple(order), len(ranked))


def _ascending(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))


@dataclass(frozen=True)
class _Chunk:
    cost: float
    site: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class _Ranking:
    """Chunks of `total` units that compete with each other, in the order of their removal."""

    site: str | None  # None: all sites together
    total: int
    chunks: tuple[_Chunk, ...]

    @property
    def removable(self) -> int:
        return sum(len(chunk.units) for chunk in self.chunks)

    def target(self, ratio: float | Fraction) -> int:
        # The ratio as the decimal in the recipe: 0.29 of 100 is 29, but 28.999... in floating point.
        return math.floor(Fraction(str(ratio)) * self.total)


def select(
    scores: Scores,
    ratio: float,
    scope: Scope = "global",
    normalize: Normalize = "none",
    keep_at_least: int = 1,
    multiple_of: int = 1,
    counts: Counts = "any",
    within_groups: bool = False,
    sites: str = "*",
) -> Plan:
    """Chooses the units to keep.

    Args:
        scores: one score per unit; the lowest are removed first.
        ratio: share of all units to remove, 0 <= ratio < 1; floor(ratio x units) are removed.
        scope: rank all units together, or the units of each site alone.
        normalize: "layer" divides a site's scores by their mean before ranking (no effect within one site).
        keep_at_least: the fewest units a site keeps.
        multiple_of: every site that loses units keeps a multiple of this.
        counts: "equal" removes the same number from every site (all sites must have equally many).
        within_groups: if query heads share KV heads, remove the same number of query heads from each group.
        sites: a glob for the names of the sites that may lose units; the ratio is a share of their units.

    Raises:
        UsageError: the ratio cannot be reached with these floors, or is above 0 and would remove nothing; no site
            matches; `within_groups` is set and no site has groups.
    """
    _require_rules(ratio, scope, normalize, keep_at_least, multiple_of, counts)
    candidates = _candidates(scores, within_groups)
    eligible = _eligible(candidates, sites)
    chunks = [_chunks(candidate, normalize, keep_at_least, multiple_of) for candidate in eligible]
    rankings = _rankings(eligible, chunks, scope, counts)
    floors = _floors(keep_at_least, multiple_of)
    removed = {unit for ranking in rankings for unit in _removed(ranking, ratio, rankings, floors)}
    if ratio > 0 and not removed:
        raise _removes_nothing(ratio, eligible, rankings, floors)
    return Plan(
        tuple(
            SitePlan(c.site, c.unit, c.total, tuple(u for u in range(c.total) if (c.index, u) not in removed))
            for c in candidates
        )
    )


def _require_rules(
    ratio: float, scope: str, normalize: str, keep_at_least: int, multiple_of: int | str, counts: str
) -> None:
    """Refuses rules that are wrong for any scores.

    Raises:
        UsageError: with the recipe key at fault.
    """
    for key, value, known in (("scope", scope, Scope), ("normalize", normalize, Normalize), ("counts", counts, Counts)):
        require_known(f"select.{key}", value, get_args(known))
    if not 0 <= ratio < 1:
        hint = "every site keeps at least one unit"
        raise UsageError(f"ratio {ratio} is not in [0, 1)", keys=("select.ratio",), hint=hint)
    if isinstance(multiple_of, str):
        what = f"multiple_of {multiple_of!r} needs a latency table"
        hint = "give a number here; a run measures the table if the recipe says multiple_of: auto"
        raise UsageError(what, keys=("select.multiple_of",), hint=hint)
    for key, floor in (("keep_at_least", keep_at_least), ("multiple_of", multiple_of)):
        if floor < 1:
            hint = "every site keeps at least one unit"
            raise UsageError(f"{key} is {floor}, but must be at least 1", keys=(f"select.{key}",), hint=hint)


def _floors(keep_at_least: int, multiple_of: int) -> tuple[str, ...]:
    """The keys of the two floors, the stricter one first."""
    keys = ("select.keep_at_least", "select.multiple_of")
    return keys if keep_at_least >= multiple_of else keys[::-1]


def _candidates(scores: Scores, within_groups: bool) -> list[_Removable]:
    if within_groups and not any(site.query_heads for site in scores.sites):
        hint = "remove within_groups: single heads are deleted in this model"
        what = "within_groups has no effect: no site has KV groups of several query heads"
        raise UsageError(what, keys=("select.within_groups",), hint=hint)
    return [_Removable.of(index, site, within_groups) for index, site in enumerate(scores.sites)]


def _eligible(candidates: Sequence[_Removable], sites: str) -> list[_Removable]:
    found = [c for c in candidates if fnmatchcase(c.site, sites)]
    if not found:
        hint = f"the first site is {candidates[0].site}, and * stands for any text"
        raise UsageError(f"no site matches '{sites}'", keys=("select.sites",), hint=hint)
    return found


def _rankings(
    eligible: Sequence[_Removable], chunks: Sequence[list[_Chunk]], scope: Scope, counts: Counts
) -> list[_Ranking]:
    totals = [candidate.total for candidate in eligible]
    if counts == "equal" and len(set(totals)) > 1:
        what = "counts: equal needs the same number of units in every site"
        raise UsageError(what, keys=("select.counts",), hint="use counts: any")
    if scope == "layer" or counts == "equal":
        return [_Ranking(site.site, site.total, tuple(own)) for site, own in zip(eligible, chunks, strict=True)]
    ranked = sorted((chunk for own in chunks for chunk in own), key=lambda c: (c.cost, c.site))
    return [_Ranking(None, sum(totals), tuple(ranked))]


def _removes_nothing(
    ratio: float, eligible: Sequence[_Removable], rankings: Sequence[_Ranking], floors: tuple[str, ...]
) -> UsageError:
    works, one_head = _working_ratios(rankings), max(site.total for site in eligible) == 1
    hint = _ONE_HEAD_PER_BLOCK if one_head else _FLOORS_TOO_HIGH
    return UsageError(
        f"ratio {ratio} removes nothing here",
        keys=("select.ratio", *floors) if works or one_head else floors,
        hint=f"the smallest ratio that removes a unit is {works[0]}; use 0 to change nothing" if works else hint,
    )


def random_plan(scores: Scores, seed: int, ratio: float, **rules: Any) -> Plan:
    """A plan of the same size by the same rules, from random scores: the control for a score.

    Args:
        scores: of the same sites and units; their values are not used.
        seed: for the random scores.
        ratio, rules: as for `select`.
    """
    rng = random.Random(seed)
    drawn = (
        replace(
            site,
            scores=tuple(rng.random() for _ in site.scores),
            query_heads=tuple(tuple(rng.random() for _ in group) for group in site.query_heads),
        )
        for site in scores.sites
    )
    return select(Scores("random", tuple(drawn)), ratio, **rules)


def _chunks(site: _Removable, normalize: Normalize, keep_at_least: int, multiple_of: int) -> list[_Chunk]:
    total = site.total
    mean = math.fsum(site.scores) / total
    scale = mean if normalize == "layer" and mean > 0 else 1.0
    floor = math.ceil(keep_at_least / multiple_of) * multiple_of
    steps = range(total - site.step, 0, -site.step)
    stops = [total, *(kept for kept in steps if kept % multiple_of == 0 and kept >= floor)]
    chunks: list[_Chunk] = []
    for before, after in pairwise(stops):
        units = site.order[total - before : total - after]
        mean_score = math.fsum(site.scores[u] for u in units) / len(units) / scale
        # Never below the previous chunk, because the mean of equal scores can round to less than the score.
        cost = max(mean_score, chunks[-1].cost) if chunks else mean_score
        chunks.append(_Chunk(cost, site.index, tuple(units)))
    return chunks


def _removed(
    ranking: _Ranking, ratio: float, rankings: Sequence[_Ranking], floors: tuple[str, ...]
) -> set[tuple[int, int]]:
    target = ranking.target(ratio)
    if target > ranking.removable:
        works = _working_ratios(rankings)
        units = f"{ranking.total} units" + (f" of {ranking.site}" if ranking.site else "")
        raise UsageError(
            f"ratio {ratio} means {target} of {units}, but the floors allow the removal of only {ranking.removable}",
            keys=("select.ratio", *floors) if works else floors,
            hint=f"use a ratio of at most {works[-1]}, or lower the floors" if works else _FLOORS_TOO_HIGH,
        )
    removed: set[tuple[int, int]] = set()
    for chunk in ranking.chunks:
        if len(removed) + len(chunk.units) > target:
            break
        removed |= {(chunk.site, unit) for unit in chunk.units}
    return removed


def _working_ratios(rankings: Sequence[_Ranking]) -> list[float]:
    """The ratios at which one more chunk is removed and every floor still holds, ascending."""
    steps = {
        _decimal(removed, ranking.total)
        for ranking in rankings
        for removed in accumulate(len(chunk.units) for chunk in ranking.chunks)
    }
    return sorted(step for step in steps if all(r.target(step) <= r.removable for r in rankings))


def _decimal(units: int, total: int) -> float:
    """The shortest decimal ratio with at least four digits that gives `units` of `total`."""
    for digits in count(4):
        ratio = Fraction(math.ceil(Fraction(units, total) * 10**digits), 10**digits)
        if math.floor(ratio * total) == units:
            return float(ratio)
    raise AssertionError("unreachable: some number of digits is enough")
