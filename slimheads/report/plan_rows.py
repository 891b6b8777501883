"""A plan as the rows of a picture: layer by layer, with what an attention and a feed-forward site of it keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import ScoreTable

MOST_BARS = 64  # with more feed-forward sites than this, those of one layer are added up


@dataclass(frozen=True)
class HeadRow:
    """The scores of an attention site and the units that it keeps."""

    name: str  # of the layer, where it has no other attention site
    index: int  # among the plan's attention sites
    scores: tuple[float, ...]
    kept: frozenset[int]


@dataclass(frozen=True)
class WidthRow:
    """The neurons of a feed-forward site, or of several in one layer."""

    name: str  # of the layer, where it has no other feed-forward site
    kept: int
    total: int


@dataclass(frozen=True)
class Row:
    """One row; a dropped layer has neither heads nor a width."""

    name: str  # of the layer
    heads: HeadRow | None = None
    width: WidthRow | None = None
    dropped: bool = False


_NamedRow = TypeVar("_NamedRow", HeadRow, WidthRow)


def plan_rows(scores: ScoreTable, plan: Plan) -> list[Row]:
    """The rows in the model's order. Sites of two kinds stand side by side where they belong to the same layer."""
    layers = {site.site: not site.kept for site in plan.of_kind("layer").sites}
    scored = {(site.kind, site.site): site.scores for site in scores.sites}
    heads = [
        HeadRow(site.site, index, scored[site.key], frozenset(site.kept))
        for index, site in enumerate(plan.of_kind("attention").sites)
    ]
    widths = [WidthRow(s.site, len(s.kept), s.total) for s in plan.of_kind("feed_forward").sites]
    near_heads = _numbered([*layers, *(row.name for row in widths)])
    near_widths = _numbered([*layers, *(row.name for row in heads)])
    blocks: dict[str, tuple[list[HeadRow], list[WidthRow]]] = {layer: ([], []) for layer in layers}
    for head_row in heads:
        blocks.setdefault(_block(head_row.name, layers, near_heads), ([], []))[0].append(head_row)
    for width_row in widths:
        blocks.setdefault(_block(width_row.name, layers, near_widths), ([], []))[1].append(width_row)
    rows = []
    for block, (own_heads, own_widths) in blocks.items():
        if layers.get(block):
            rows.append(Row(block, dropped=True))
            continue
        if len(own_widths) > 1 and len(widths) > MOST_BARS:
            own_widths = [WidthRow(block, sum(row.kept for row in own_widths), sum(row.total for row in own_widths))]
        pairs = zip_longest(_sole(own_heads, block), _sole(own_widths, block))
        rows += [Row(block, head_row, width_row) for head_row, width_row in pairs]
    return rows


def _sole(rows: list[_NamedRow], block: str) -> list[_NamedRow]:
    return [replace(rows[0], name=block)] if len(rows) == 1 else rows


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
