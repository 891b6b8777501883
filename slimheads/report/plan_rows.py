"""A plan as the rows of a picture: layer by layer, with what an attention and a feed-forward site of it keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import ScoreTable

MOST_BARS = 64  # with more feed-forward sites than this, those of one layer are added up


@dataclass(frozen=True)
class HeadRow:
    """The scores of an attention site and the units that it keeps; `index` counts the plan's attention sites."""

    index: int
    site: str
    scores: tuple[float, ...]
    kept: frozenset[int]


@dataclass(frozen=True)
class WidthRow:
    """The neurons of a feed-forward site, or of several in one layer."""

    site: str
    kept: int
    total: int


@dataclass(frozen=True)
class Row:
    """One row; a dropped layer has neither heads nor a width."""

    name: str
    heads: HeadRow | None = None
    width: WidthRow | None = None
    dropped: bool = False


def plan_rows(scores: ScoreTable, plan: Plan) -> list[Row]:
    """The rows in the model's order. Sites of two kinds stand side by side where they belong to the same layer."""
    layers = {site.site: not site.kept for site in plan.of_kind("layer").sites}
    scored = {(site.kind, site.site): site.scores for site in scores.sites}
    heads = [
        HeadRow(index, site.site, scored[site.key], frozenset(site.kept))
        for index, site in enumerate(plan.of_kind("attention").sites)
    ]
    widths = [WidthRow(s.site, len(s.kept), s.total) for s in plan.of_kind("feed_forward").sites]
    near_heads = _numbered([*layers, *(row.site for row in widths)])
    near_widths = _numbered([*layers, *(row.site for row in heads)])
    blocks: dict[str, tuple[list[HeadRow], list[WidthRow]]] = {layer: ([], []) for layer in layers}
    for head_row in heads:
        blocks.setdefault(_block(head_row.site, layers, near_heads), ([], []))[0].append(head_row)
    for width_row in widths:
        blocks.setdefault(_block(width_row.site, layers, near_widths), ([], []))[1].append(width_row)
    rows = []
    for block, (own_heads, own_widths) in blocks.items():
        if layers.get(block):
            rows.append(Row(block, dropped=True))
        else:
            rows += _block_rows(block, own_heads, _added_up(block, own_widths, len(widths)))
    return rows


def _added_up(block: str, widths: Sequence[WidthRow], all_widths: int) -> Sequence[WidthRow]:
    if len(widths) < 2 or all_widths <= MOST_BARS:
        return widths
    return [WidthRow(block, sum(row.kept for row in widths), sum(row.total for row in widths))]


def _block_rows(block: str, heads: Sequence[HeadRow], widths: Sequence[WidthRow]) -> list[Row]:
    pairs = list(zip_longest(heads, widths))
    if len(pairs) == 1:
        return [Row(block, *pairs[0])]
    return [Row((head_row or width_row).site, head_row, width_row) for head_row, width_row in pairs]


def _block(site: str, layers: Iterable[str], near: set[str]) -> str:
    """The layer that a site lies in: a planned one, or the longest path up to a number that it shares with a site of
    another kind. Without either, the site itself.
    """
    path = f"{site}."
    inside = [layer for layer in layers if path.startswith(f"{layer}.")]
    shared = [prefix for prefix in _numbered([site]) if prefix in near]
    return max(inside or shared, key=len, default=site)


def _numbered(sites: Iterable[str]) -> set[str]:
    """All beginnings of the names that end in a number: encoder.layer.3 of encoder.layer.3.attention."""
    found = set()
    for site in sites:
        parts = site.split(".")
        found |= {".".join(parts[: end + 1]) for end, part in enumerate(parts) if part.isdigit()}
    return found
