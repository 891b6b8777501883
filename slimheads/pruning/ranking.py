"""Which units of one kind of site are removed, by their scores. A pure function; see `select` for the rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, count, pairwise

from slimheads.errors import UsageError
from slimheads.names import Counts, Normalize, Scope, Unit
from slimheads.pruning.scores import SiteScores

Removed = frozenset[tuple[str, int]]  # (site, unit)


@dataclass(frozen=True)
class Rules:
    """How much of one kind is removed, and what stays. Errors name the recipe's keys."""

    ratio: float
    ratio_key: str
    scope: Scope
    normalize: Normalize
    counts: Counts
    keep_at_least: int
    multiple_of: int
    floor_keys: tuple[str, str]  # of keep_at_least and of multiple_of

    @property
    def floors(self) -> tuple[str, ...]:
        """The keys of the floors, the stricter one first."""
        return tuple(
            dict.fromkeys(self.floor_keys if self.keep_at_least >= self.multiple_of else self.floor_keys[::-1])
        )


@dataclass(frozen=True)
class Removable:
    """A site, the order in which its units would be removed, and how many are removed in one step."""

    site: str
    unit: Unit
    scores: tuple[float, ...]
    order: tuple[int, ...]
    step: int

    @property
    def total(self) -> int:
        """Its units."""
        return len(self.scores)

    @classmethod
    def of(cls, site: SiteScores, within_groups: bool) -> Removable:
        """By its units, or by query heads, the lowest of each group in one step."""
        if not (within_groups and site.query_heads):
            return cls(site.site, site.unit, site.scores, tuple(_ascending(site.scores)), 1)
        members = len(site.query_heads[0])
        ranked = [[g * members + m for m in _ascending(group)] for g, group in enumerate(site.query_heads)]
        order = [unit for step in zip(*ranked, strict=True) for unit in step]
        return cls(site.site, "head", site.by_head().scores, tuple(order), len(ranked))


def _ascending(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))


@dataclass(frozen=True)
class _Chunk:
    cost: float
    place: int  # of its site in the model
    site: str
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


def removed_units(sites: Sequence[Removable], rules: Rules) -> Removed:
    """The units that go.

    Raises:
        UsageError: the ratio cannot be reached with these floors, or is above 0 and would remove nothing.
    """
    rankings = _rankings(sites, rules)
    removed = frozenset(unit for ranking in rankings for unit in _removed(ranking, rules, rankings))
    if rules.ratio > 0 and not removed:
        raise _removes_nothing(sites, rules, rankings)
    return removed


def _rankings(sites: Sequence[Removable], rules: Rules) -> list[_Ranking]:
    chunks = [_chunks(place, site, rules) for place, site in enumerate(sites)]
    totals = [site.total for site in sites]
    if rules.counts == "equal" and len(set(totals)) > 1:
        what = "counts: equal needs the same number of units in every site"
        raise UsageError(what, keys=("select.counts",), hint="use counts: any")
    if rules.scope == "layer" or rules.counts == "equal":
        return [_Ranking(site.site, site.total, tuple(own)) for site, own in zip(sites, chunks, strict=True)]
    ranked = sorted((chunk for own in chunks for chunk in own), key=lambda c: (c.cost, c.place))
    return [_Ranking(None, sum(totals), tuple(ranked))]


def _chunks(place: int, site: Removable, rules: Rules) -> list[_Chunk]:
    total = site.total
    mean = math.fsum(site.scores) / total
    scale = mean if rules.normalize == "layer" and mean > 0 else 1.0
    floor = math.ceil(rules.keep_at_least / rules.multiple_of) * rules.multiple_of
    steps = range(total - site.step, 0, -site.step)
    stops = [total, *(kept for kept in steps if kept % rules.multiple_of == 0 and kept >= floor)]
    chunks: list[_Chunk] = []
    for before, after in pairwise(stops):
        units = site.order[total - before : total - after]
        mean_score = math.fsum(site.scores[u] for u in units) / len(units) / scale
        # Never below the previous chunk, because the mean of equal scores can round to less than the score.
        cost = max(mean_score, chunks[-1].cost) if chunks else mean_score
        chunks.append(_Chunk(cost, place, site.site, tuple(units)))
    return chunks


def _removed(ranking: _Ranking, rules: Rules, rankings: Sequence[_Ranking]) -> set[tuple[str, int]]:
    target = ranking.target(rules.ratio)
    if target > ranking.removable:
        works = _working_ratios(rankings)
        units = f"{ranking.total} units" + (f" of {ranking.site}" if ranking.site else "")
        allowed = f"the floors allow the removal of only {ranking.removable}"
        raise UsageError(
            f"{_name(rules)} {rules.ratio} means {target} of {units}, but {allowed}",
            keys=(rules.ratio_key, *rules.floors) if works else rules.floors,
            hint=f"use a ratio of at most {works[-1]}, or lower {_floors(rules)}" if works else _floors_too_high(rules),
        )
    removed: set[tuple[str, int]] = set()
    for chunk in ranking.chunks:
        if len(removed) + len(chunk.units) > target:
            break
        removed |= {(chunk.site, unit) for unit in chunk.units}
    return removed


def _removes_nothing(sites: Sequence[Removable], rules: Rules, rankings: Sequence[_Ranking]) -> UsageError:
    works, one_each = _working_ratios(rankings), max(site.total for site in sites) == 1
    hint = "every block has one unit, which is kept: use ratio 0" if one_each else _floors_too_high(rules)
    return UsageError(
        f"{_name(rules)} {rules.ratio} removes nothing here",
        keys=(rules.ratio_key, *rules.floors) if works or one_each else rules.floors,
        hint=f"the smallest ratio that removes a unit is {works[0]}; use 0 to change nothing" if works else hint,
    )


def _name(rules: Rules) -> str:
    return rules.ratio_key.rpartition(".")[2]


def _floors_too_high(rules: Rules) -> str:
    verb = "allow" if len(rules.floors) > 1 else "allows"
    return f"lower {_floors(rules)}, which {verb} no removal at any ratio, or use {_name(rules)} 0"


def _floors(rules: Rules) -> str:
    return " or ".join(sorted(key.rpartition(".")[2] for key in rules.floors))


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
