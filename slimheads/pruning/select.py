"""Selection: numbers in, a plan out. Pure; no model is needed.

Rules, in order:
1. A site may keep any number of units that is a multiple of `multiple_of` and at least `keep_at_least` (never below 1),
   or all of them.
2. So each site gives up its units in chunks: weakest first, ties broken by the unit's index. With `multiple_of: 1` a
   chunk is one unit.
3. The chunks of all sites are taken in ascending order of their mean score (ties: the site's place in the model) until
   floor(ratio x units) units are gone, or the next chunk would exceed that number.
4. `scope: layer` does this within each site alone. `counts: equal` also takes the same number from every site.
5. `within_groups` takes query heads instead of KV groups: a step takes the weakest head left in each group of a site.
6. Sites whose name does not match the glob `sites` give up nothing and are not counted.

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

_LET_GO = "lower keep_at_least or multiple_of, which let nothing go at any ratio, or use 0 to change nothing"
_SINGLE = "every attention block has a single head, which stays: use 0"


@dataclass(frozen=True)
class _Removable:
    """A site, its units in the order in which they would go, and how many have to go together."""

    index: int
    site: str
    unit: Unit
    scores: tuple[float, ...]
    weakest_first: tuple[int, ...]
    step: int

    @property
    def total(self) -> int:
        return len(self.scores)

    @classmethod
    def of(cls, index: int, site: SiteScores, within_groups: bool) -> _Removable:
        if not (within_groups and site.query_heads):
            order = _weakest_first(site.scores)
            return cls(index, site.site, site.unit, site.scores, tuple(order), 1)
        members = len(site.query_heads[0])
        ranked = [[g * members + m for m in _weakest_first(group)] for g, group in enumerate(site.query_heads)]
        order = [unit for step in zip(*ranked, strict=True) for unit in step]
        return cls(index, site.site, "head", site.by_head().scores, tuple(order), len(ranked))


def _weakest_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))


@dataclass(frozen=True)
class _Chunk:
    cost: float
    site: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class _Ranking:
    """Chunks that compete with each other, in the order in which they go, out of `total` units."""

    site: str | None  # None: of all sites together
    total: int
    chunks: tuple[_Chunk, ...]

    @property
    def possible(self) -> int:
        return sum(len(chunk.units) for chunk in self.chunks)

    def wanted(self, ratio: float | Fraction) -> int:
        # The ratio as the decimal that was written: 0.29 of 100 is 29, where floating point says 28.999...
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
        scores: one number a unit; the lowest go first.
        ratio: share of all units to remove, 0 <= ratio < 1; floor(ratio x units) go.
        scope: rank all units together, or each site's among themselves.
        normalize: "layer" divides a site's scores by their mean before ranking (no effect within one site).
        keep_at_least: the fewest units a site keeps.
        multiple_of: every site that gives up units keeps a multiple of this.
        counts: "equal" removes the same number from every site (all must have as many).
        within_groups: where query heads share KV heads, remove the same number of query heads from each group.
        sites: a glob over the names of the sites that may give up units; the ratio is a share of theirs.

    Raises:
        UsageError: the ratio cannot be met under these floors, or would remove nothing although it is above 0; no
            site matches, or none has groups although `within_groups` is set.
    """
    _require_rules(ratio, scope, normalize, keep_at_least, multiple_of, counts)
    candidates = _candidates(scores, within_groups)
    eligible = _eligible(candidates, sites)
    chunks = [_chunks(candidate, normalize, keep_at_least, multiple_of) for candidate in eligible]
    totals = [candidate.total for candidate in eligible]
    if counts == "equal" and len(set(totals)) > 1:
        what = "counts: equal needs the same number of units in every site"
        raise UsageError(what, keys=("select.counts",), hint="use counts: any")
    if scope == "layer" or counts == "equal":
        named = zip(eligible, totals, chunks, strict=True)
        rankings = [_Ranking(c.site, total, tuple(own)) for c, total, own in named]
    else:
        ranked = sorted((chunk for own in chunks for chunk in own), key=lambda c: (c.cost, c.site))
        rankings = [_Ranking(None, sum(totals), tuple(ranked))]
    floors = _floors(keep_at_least, multiple_of)
    removed = {unit for ranking in rankings for unit in _take(ranking, ratio, rankings, floors)}
    if ratio > 0 and not removed:
        works = _working_ratios(rankings)
        hint = _SINGLE if max(totals) == 1 else _LET_GO
        raise UsageError(
            f"ratio {ratio} removes nothing here",
            keys=("select.ratio", *floors) if works or max(totals) == 1 else floors,
            hint=f"the smallest ratio that removes a unit is {works[0]}; use 0 to change nothing" if works else hint,
        )
    return Plan(
        tuple(
            SitePlan(c.site, c.unit, c.total, tuple(u for u in range(c.total) if (c.index, u) not in removed))
            for c in candidates
        )
    )


def _require_rules(
    ratio: float, scope: str, normalize: str, keep_at_least: int, multiple_of: int | str, counts: str
) -> None:
    """What no scores would make right.

    Raises:
        UsageError: with the key of the recipe that it is about.
    """
    for key, value, known in (("scope", scope, Scope), ("normalize", normalize, Normalize), ("counts", counts, Counts)):
        require_known(f"select.{key}", value, get_args(known))
    if not 0 <= ratio < 1:
        hint = "at least one unit stays in every site"
        raise UsageError(f"ratio {ratio} is not in [0, 1)", keys=("select.ratio",), hint=hint)
    if isinstance(multiple_of, str):
        what = f"multiple_of {multiple_of!r} takes a latency table, and scores alone have none"
        hint = "give a number here; a recipe with multiple_of: auto has it measured"
        raise UsageError(what, keys=("select.multiple_of",), hint=hint)
    for key, floor in (("keep_at_least", keep_at_least), ("multiple_of", multiple_of)):
        if floor < 1:
            hint = "every site keeps at least one unit"
            raise UsageError(f"{key} is {floor}, and starts at 1", keys=(f"select.{key}",), hint=hint)


def _floors(keep_at_least: int, multiple_of: int) -> tuple[str, ...]:
    """The keys of the two floors, the stricter one first."""
    keys = ("select.keep_at_least", "select.multiple_of")
    return keys if keep_at_least >= multiple_of else keys[::-1]


def _candidates(scores: Scores, within_groups: bool) -> list[_Removable]:
    if within_groups and not any(site.query_heads for site in scores.sites):
        hint = "leave within_groups out: heads are what is deleted here"
        what = "within_groups has nothing to act on: no site has several KV groups of query heads"
        raise UsageError(what, keys=("select.within_groups",), hint=hint)
    return [_Removable.of(index, site, within_groups) for index, site in enumerate(scores.sites)]


def _eligible(candidates: Sequence[_Removable], sites: str) -> list[_Removable]:
    found = [c for c in candidates if fnmatchcase(c.site, sites)]
    if not found:
        hint = f"the first site is {candidates[0].site}, and * stands for any text"
        raise UsageError(f"no site matches '{sites}'", keys=("select.sites",), hint=hint)
    return found


def random_plan(scores: Scores, seed: int, ratio: float, **rules: Any) -> Plan:
    """A plan of the same size under the same rules, from random scores: the control that a score must beat.

    Args:
        scores: whose sites and units to choose from; the numbers are not used.
        seed: of the random numbers.
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
        units = site.weakest_first[total - before : total - after]
        mean_score = math.fsum(site.scores[u] for u in units) / len(units) / scale
        # Never below the chunk before: the mean of equal scores can round to less than the score.
        cost = max(mean_score, chunks[-1].cost) if chunks else mean_score
        chunks.append(_Chunk(cost, site.index, tuple(units)))
    return chunks


def _take(
    ranking: _Ranking, ratio: float, rankings: Sequence[_Ranking], floors: tuple[str, ...]
) -> set[tuple[int, int]]:
    wanted = ranking.wanted(ratio)
    if wanted > ranking.possible:
        works = _working_ratios(rankings)
        units = f"{ranking.total} units" + (f" of {ranking.site}" if ranking.site else "")
        raise UsageError(
            f"ratio {ratio} means {wanted} of {units}, but the floors let only {ranking.possible} go",
            keys=("select.ratio", *floors) if works else floors,
            hint=f"use a ratio of at most {works[-1]}, or lower the floors" if works else _LET_GO,
        )
    taken: set[tuple[int, int]] = set()
    for chunk in ranking.chunks:
        if len(taken) + len(chunk.units) > wanted:
            break
        taken |= {(chunk.site, unit) for unit in chunk.units}
    return taken


def _working_ratios(rankings: Sequence[_Ranking]) -> list[float]:
    """The ratios at which one more chunk goes and every floor still holds, ascending."""
    steps = {
        _decimal(gone, ranking.total)
        for ranking in rankings
        for gone in accumulate(len(chunk.units) for chunk in ranking.chunks)
    }
    return sorted(step for step in steps if all(r.wanted(step) <= r.possible for r in rankings))


def _decimal(units: int, total: int) -> float:
    """The shortest decimal ratio, of four digits or more, that means `units` of `total`."""
    for digits in count(4):
        ratio = Fraction(math.ceil(Fraction(units, total) * 10**digits), 10**digits)
        if math.floor(ratio * total) == units:
            return float(ratio)
    raise AssertionError("unreachable: enough digits always do")
