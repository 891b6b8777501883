"""The kinds of a model's sites: sites that cost the same at the same count, and the counts that are measured of each.

The count of an attention or feed-forward kind is the number of units that each of its sites keeps. The count of a layer
kind, which is the alike layers of one stack, is the number of layers that stay.

Which counts are measured, and which of them a count between is interpolated from:

1. Heads: latency is a step function of the count's remainder by the number of threads. Each remainder is measured and
   interpolated alone.
2. Neurons: about twelve widths, in even steps. In wide blocks there are also two widths each that are a multiple of 16
   but not of 32, of 8 but not of 16, and not of 8. Each of these alignments is interpolated alone.
3. Layers: with a quarter, half and three quarters of them dropped, the last ones. Then no layer that stays gets another
   number, by which some architectures tell what a layer does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.family import family_of
from slimheads.families.sites import Site, find_sites, linear_features
from slimheads.names import SiteKind, Unit
from slimheads.pruning.layers import require_same_layers
from slimheads.pruning.plan import Plan, SitePlan

HEAD_COUNTS = 16  # about so many counts of heads are measured, or all where there are fewer
WIDTHS = 12  # so many even widths are measured, or all where there are fewer
ALIGNMENTS = (8, 16, 32)  # widths that are told apart, in features; an AVX2 register has 8, an AVX-512 register 16
_PER_RESIDUE = 3  # least number of counts measured for each remainder by the number of threads
_UNEVEN_FROM = 256  # neurons; in narrower blocks alignment is not measured
_UNEVEN = (8, 11, 16)  # so far below a multiple of 64: a width of each lesser alignment, neither its best nor its worst
_DROPPED = (0.25, 0.5, 0.75)  # of the layers of a kind


class Stored(BaseModel):
    """Part of a latency table's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kind(Stored):
    """Sites that cost the same at the same count."""

    kind: SiteKind
    name: str  # the sites' name with * for each index
    unit: Unit
    total: PositiveInt  # the count at which nothing is deleted
    step: PositiveInt  # units that go together: one of each KV group, or 1
    least: NonNegativeInt  # the lowest count
    sites: tuple[str, ...] = Field(min_length=1)

    def counts(self, threads: int) -> tuple[int, ...]:
        """The counts below `total` that are measured, ascending."""
        if self.kind == "attention":
            return measured_heads(self.total, self.step, threads)
        if self.kind == "feed_forward":
            return measured_widths(self.total)
        return measured_layers(self.total, self.least)

    def plan(self, count: int) -> Plan:
        """The plan of a point: this kind has the count, and all other sites are whole."""
        if self.kind == "layer":
            layers = enumerate(self.sites)
            return Plan(tuple(SitePlan(s, "layer", 1, (0,) if place < count else (), "layer") for place, s in layers))
        own = self.keeping(count)
        return Plan(tuple(SitePlan(site, self.unit, self.total, own, self.kind) for site in self.sites))

    def keeping(self, count: int) -> tuple[int, ...]:
        """The units of a site that stay when `count` do: the first ones, or the first ones of each group."""
        members = self.total // self.step
        return tuple(group * members + member for group in range(self.step) for member in range(count // self.step))

    def between(self, count: int, threads: int) -> list[tuple[int, float]]:
        """The measured counts (or `total`) that a count's share is interpolated from, with their weights.

        They are its two neighbours among the counts that are alike; outside of these, the two nearest.
        """
        measured = (*self.counts(threads), self.total)
        if count in measured:
            return [(count, 1.0)]
        alike = [at for at in measured if self._likeness(at, threads) == self._likeness(count, threads)]
        above = min(max(1, sum(at < count for at in alike)), len(alike) - 1)
        low, high = alike[above - 1], alike[above]
        part = (count - low) / (high - low)
        return [(low, 1 - part), (high, part)]

    def _likeness(self, count: int, threads: int) -> int:
        """The same for counts that are interpolated from each other."""
        if self.kind == "attention":
            return count % threads
        return alignment(count) if self.kind == "feed_forward" and self.total >= _UNEVEN_FROM else 0


def measured_heads(total: int, step: int, threads: int) -> tuple[int, ...]:
    """The counts of heads below `total` that are measured, ascending.

    A count's remainder by the number of threads decides how evenly heads are distributed over them, so latency is a
    step function. Where not all counts are measured, each remainder gets the same number, its lowest and highest among
    them; the counts between are interpolated within their remainder, which keeps the steps.
    """
    residues: dict[int, list[int]] = {}
    for count in range(step, total, step):
        residues.setdefault(count % threads, []).append(count)
    each = max(_PER_RESIDUE, math.ceil(HEAD_COUNTS / max(1, len(residues))))
    return tuple(sorted(count for alike in residues.values() for count in _spread(alike, each)))


def measured_widths(total: int) -> tuple[int, ...]:
    """The numbers of neurons below `total` that are measured, ascending.

    Multiples of 32, or of the largest power of two below it that gives at least three. In a block of 256 neurons or
    more also two widths of each lesser alignment: near a quarter of the neurons and near all of them.
    """
    grid = next(step for step in (32, 16, 8, 4, 2, 1) if step == 1 or (total - 1) // step >= 3)
    even = _spread(range(grid, total, grid), WIDTHS)
    if total < _UNEVEN_FROM:
        return tuple(sorted(even))
    bases = (total // 4 // 64 * 64, total // 64 * 64)
    uneven = {base - off for base in bases for off in _UNEVEN}
    return tuple(sorted(even | uneven))


def measured_layers(total: int, least: int) -> tuple[int, ...]:
    """The numbers of layers that stay, of `total`, that are measured, ascending."""
    most = total - least
    gone = {min(most, max(1, round(part * total))) for part in _DROPPED} if most else set()
    return tuple(sorted(total - number for number in gone))


def alignment(width: int) -> int:
    """The largest of `ALIGNMENTS` that divides a width, or 1."""
    return max((step for step in ALIGNMENTS if width % step == 0), default=1)


def _spread(counts: Sequence[int], wanted: int) -> set[int]:
    if len(counts) <= wanted:
        return set(counts)
    return {counts[round(place * (len(counts) - 1) / (wanted - 1))] for place in range(wanted)}


def kinds_of(
    model: PreTrainedModel, within_groups: bool = False, kinds: Iterable[SiteKind] = ("attention",)
) -> tuple[Kind, ...]:
    """The kinds of a model's sites, in the model's order.

    Attention and feed-forward sites are alike if their names differ only in indices and their units, head size,
    projections (both sizes of each) and tables are the same: the other parts of a layer cost the same in the dense
    model and in the slim one. Layers are alike if they lie in the same stack and all their weights have the same sizes.

    Args:
        within_groups: count query heads where they share KV heads, one of each group at a time.
        kinds: of sites; all others are left out.
    """
    wanted = set(kinds)
    sites = [site for site in find_sites(model) if site.kind in wanted]
    stacks = [site.stack for site in sites if site.kind == "layer"]
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        likeness = _layer_likeness(model, site) if site.kind == "layer" else _block_likeness(model, site)
        alike.setdefault((site.kind, _pattern(site), *likeness), []).append(site)
    return tuple(
        _layers(model, own, stacks.count(own[0].stack)) if own[0].kind == "layer" else _blocks(own, within_groups)
        for own in alike.values()
    )


def _block_likeness(model: PreTrainedModel, site: Site) -> tuple[object, ...]:
    own = site.name + "."
    projections = tuple(
        (p.module.removeprefix(own), *linear_features(model.get_submodule(p.module))) for p in site.projections
    )
    tables = tuple((t.module.removeprefix(own), t.name, t.entries) for t in site.tables)
    return (site.unit, site.total, site.head_dim, projections, tables)


def _layer_likeness(model: PreTrainedModel, site: Site) -> tuple[object, ...]:
    weights = model.get_submodule(site.name).named_parameters()
    return (site.stack, site.stays is None, tuple((name, tuple(weight.shape)) for name, weight in weights))


def _pattern(site: Site) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.name)


def _blocks(sites: Sequence[Site], within_groups: bool) -> Kind:
    first = sites[0]
    seen = first.by_head() if within_groups and first.kind == "attention" else first
    step = first.total if seen.unit != first.unit else 1
    names = tuple(site.name for site in sites)
    return Kind(
        kind=first.kind, name=_pattern(first), unit=seen.unit, total=seen.total, step=step, least=step, sites=names
    )


def _layers(model: PreTrainedModel, sites: Sequence[Site], in_stack: int) -> Kind:
    """A stack is not dropped whole; layers stay that cannot be dropped, or whose points transformers cannot rebuild."""
    total = len(sites)
    least = total if sites[0].stays else int(total == in_stack)
    _, family = family_of(model.config)
    try:
        for count in measured_layers(total, least):
            require_same_layers(model, family, sites[count:])
    except UsageError:
        least = total
    names = tuple(site.name for site in sites)
    return Kind(kind="layer", name=_pattern(sites[0]), unit="layer", total=total, step=1, least=least, sites=names)
