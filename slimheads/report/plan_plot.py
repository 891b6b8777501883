"""The picture of a plan: the map of head scores, beside it the width that each feed-forward block keeps.

It takes the width in pixels, because letters in a plot that is only scaled down to a phone cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slimheads import formatting as fmt
from slimheads.names import Unit
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import ScoreTable
from slimheads.report import wording
from slimheads.report.model import count_kinds
from slimheads.report.plan_rows import HeadRow, Row, WidthRow, plan_rows
from slimheads.report.svg import RAMP_STEPS, Drawing, text_width

_ABOVE, _BELOW = 34.0, 52.0  # px, for the headings and the legend
_KEPT = 62.0  # px, for the column of kept heads
_HEIGHT = 620  # px, of all rows together, as far as the least height of a row allows
_READABLE = 13.0  # px, of a row with a text of its own
_DROPPED = "dropped"


@dataclass(frozen=True)
class _Listed:
    """The rows of one panel, their labels, and what those count."""

    rows: Sequence[Row]
    labels: Sequence[str]
    axis: str

    @classmethod
    def of(cls, rows: Sequence[Row], names: Sequence[str], width: int) -> _Listed:
        labels, axis = wording.site_labels(names)
        if max(map(text_width, labels)) > width * 0.35:  # long names would leave no room to draw: number the rows
            labels = [str(row) for row in range(len(rows))]
        return cls(rows, labels, axis)

    @property
    def left(self) -> float:
        """Where the labels end, px."""
        return 14 + max(map(text_width, [*self.labels, self.axis]))


@dataclass(frozen=True)
class _Panel:
    """Rows of equal height, and where what is drawn in them starts and ends, px."""

    drawing: Drawing
    listed: _Listed
    left: float
    right: float
    top: float
    row_h: float

    @property
    def rows(self) -> Sequence[Row]:
        return self.listed.rows

    @property
    def bottom(self) -> float:
        return self.top + len(self.rows) * self.row_h

    def labelled(self, index: int) -> bool:
        return index % _stride(self.row_h, _READABLE) == 0

    def middle(self, index: int) -> float:
        return self.top + (index + 0.5) * self.row_h


def plan_picture(scores: ScoreTable, plan: Plan, *, width: int, name: str) -> str:
    """Head scores as tiles, one row per attention site and one column per unit; a deleted unit has a dot on its tile.
    Beside it, the share of each feed-forward block's neurons that stays, as a bar; below it on a phone, and where a
    layer has more such blocks than attention sites. A dropped layer is an empty row.

    Each deleted head's dot has the id `NAME-deleted-SITE-UNIT`, both counted from 0.
    """
    rows = plan_rows(scores, plan)
    heads, widths = [row.heads for row in rows if row.heads], [row.width for row in rows if row.width]
    beside = bool(widths) and width > 600 and all(row.heads or row.dropped for row in rows)
    upper = [row for row in rows if row.heads or row.dropped]
    above = _Listed.of(upper, [row.heads.name if row.heads else row.name for row in upper], width)
    end = above.left + (width - above.left) * 0.52 if beside else float(width)
    columns = max(len(row.scores) for row in heads)
    cell_w = min(64.0, (end - above.left - _KEPT) / columns)
    row_h = _row_height(len(upper), max(cell_w, 20.0), _READABLE) if beside else _row_height(len(upper), cell_w, 4.0)
    bottom = _ABOVE + len(upper) * row_h + _BELOW
    lower = [row for row in rows if row.width or row.dropped] if widths and not beside else []
    lower_h = _row_height(len(lower), 20.0, _READABLE)
    drawing = Drawing(width, bottom + (_ABOVE + len(lower) * lower_h + _BELOW if lower else 0), name)
    tiles = _Panel(drawing, above, above.left, above.left + columns * cell_w, _ABOVE, row_h)
    _heat_map(tiles, heads, count_kinds(plan)["attention"].unit)
    if beside:
        _bars(replace(tiles, left=end + 28, right=float(width)), widths)
    elif lower:
        below = _Listed.of(lower, [row.width.name if row.width else row.name for row in lower], width)
        panel = _Panel(drawing, below, below.left, float(width), bottom + _ABOVE, lower_h)
        _row_labels(panel)
        _bars(panel, widths)
    return drawing.svg(_description(scores.method, heads, widths, plan))


def _row_height(rows: int, wanted: float, least: float) -> float:
    return max(least, min(28.0, wanted, _HEIGHT / rows)) if rows else 0.0


def _row_labels(panel: _Panel) -> None:
    panel.drawing.text(panel.left - 10, panel.top - 10, panel.listed.axis, align="right", colour="muted")
    for index, label in enumerate(panel.listed.labels):
        if panel.labelled(index):
            panel.drawing.text(panel.left - 10, panel.middle(index), label, align="right", colour="muted")


def _dropped_rows(panel: _Panel) -> None:
    """Empty rows; where they are too low for a label each, one for all that follow each other."""
    for index, row in enumerate(panel.rows):
        if not row.dropped:
            continue
        y, h = panel.top + index * panel.row_h, panel.row_h
        panel.drawing.rect(panel.left + 1, y + 1, panel.right - panel.left - 2, h - 2, fill="panel")
        if h >= _READABLE or index == 0 or not panel.rows[index - 1].dropped:
            panel.drawing.text(panel.left + 10, y + h / 2, _DROPPED, colour="muted")


def _heat_map(panel: _Panel, heads: Sequence[HeadRow], unit: Unit) -> None:
    drawing, columns = panel.drawing, max(len(row.scores) for row in heads)
    cell_w = (panel.right - panel.left) / columns
    drawing.text(panel.left, 9, f"{wording.units(unit, 1)} →", colour="muted")
    for column in range(0, columns, _stride(cell_w, 20)):
        drawing.text(panel.left + (column + 0.5) * cell_w, 24, str(column), align="center", colour="muted")
    drawing.text(panel.right + 10, 24, "kept", colour="muted")
    _row_labels(panel)
    _dropped_rows(panel)
    low, high = _range(heads)
    for index, row in enumerate(panel.rows):
        if not row.heads:
            continue
        if panel.labelled(index):
            kept = f"{len(row.heads.kept)} of {len(row.heads.scores)}"
            drawing.text(panel.right + 10, panel.middle(index), kept, colour="ink")
        for column, score in enumerate(row.heads.scores):
            share = (score - low) / (high - low) if high > low else 1.0
            box = (panel.left + column * cell_w, panel.top + index * panel.row_h, cell_w, panel.row_h)
            colour = f"heat{round(share * (RAMP_STEPS - 1))}"
            _tile(drawing, box, colour, column in row.heads.kept, f"{row.heads.index}-{column}")
    _heat_legend(drawing, panel.left, panel.bottom + 22, low, high)


def _bars(panel: _Panel, widths: Sequence[WidthRow]) -> None:
    """The kept share of each block's width, with the numbers of neurons beside it."""
    drawing = panel.drawing
    texts = {row: f"{fmt.whole(row.kept)} of {fmt.whole(row.total)}" for row in widths}
    room = panel.right - panel.left - 10 - max(map(text_width, texts.values()))
    drawing.text(panel.left, panel.top - 25, "feed-forward width, share kept", colour="muted")
    drawing.text(panel.left + room + 10, panel.top - 10, "kept", colour="muted")
    for share in (0.0, 0.5, 1.0):
        align = {0.0: "left", 1.0: "right"}.get(share, "center")
        drawing.text(panel.left + share * room, panel.top - 10, fmt.percent(share), align=align, colour="muted")
    _dropped_rows(replace(panel, right=panel.left + room))
    for index, row in enumerate(panel.rows):
        if not row.width:
            continue
        gap = min(4.0, panel.row_h * 0.18)
        y, h = panel.top + index * panel.row_h + gap, panel.row_h - 2 * gap
        drawing.rect(panel.left, y, room, h, fill="rule")
        drawing.rect(panel.left, y, room * row.width.kept / row.width.total, h, fill="slim")
        if panel.labelled(index):
            drawing.text(panel.left + room + 10, panel.middle(index), texts[row.width], colour="ink")
    x = panel.left
    for label, colour in (("kept", "slim"), ("removed", "rule")):
        drawing.rect(x, panel.bottom + 17, 12, 11, fill=colour)
        drawing.text(x + 18, panel.bottom + 22, label, colour="ink")
        x += 36 + text_width(label)


def _tile(drawing: Drawing, box: tuple[float, float, float, float], colour: str, kept: bool, place: str) -> None:
    x, y, w, h = box
    gap = min(1.0, w * 0.08)
    drawing.rect(x + gap, y + gap, w - 2 * gap, h - 2 * gap, fill=colour)
    if kept:
        return
    middle, gid = (x + w / 2, y + h / 2), f"deleted-{place}"
    if min(w, h) >= 16:  # the ring keeps it apart from dark tiles
        drawing.dot(*middle, min(w, h) * 0.18, fill="limit", stroke="paper", gid=gid)
    else:  # too small to tell from a disc, and a fifth of its text
        side = max(2.0, min(w, h) * 0.26)
        drawing.rect(middle[0] - side / 2, middle[1] - side / 2, side, side, fill="limit", gid=gid)


def _heat_legend(drawing: Drawing, x: float, y: float, low: float, high: float) -> None:
    lowest, highest = f"score {fmt.figures(low)}", fmt.figures(high)
    drawing.text(x, y, lowest, colour="muted")
    start = x + text_width(lowest) + 8
    for step in range(RAMP_STEPS):
        drawing.rect(start + step * 5, y - 5, 5.5, 10, fill=f"heat{step}")
    end = start + RAMP_STEPS * 5 + 8
    drawing.text(end, y, highest, colour="muted")
    mark = end + text_width(highest) + 22
    drawing.rect(mark + 0.5, y - 5.5, 12, 11, fill="heat3")
    drawing.dot(mark + 6.5, y, 2.6, fill="limit", stroke="paper")
    drawing.text(mark + 20, y, "removed", colour="ink")


def _description(method: str, heads: Sequence[HeadRow], widths: Sequence[WidthRow], plan: Plan) -> str:
    low, high = _range(heads)
    columns, kinds = max(len(row.scores) for row in heads), count_kinds(plan)
    total, kept = sum(len(row.scores) for row in heads), sum(len(row.kept) for row in heads)
    unit = wording.units(kinds["attention"].unit, 1)
    text = (
        f"Heat map of {method} scores: {len(heads)} attention blocks with up to {columns} {unit}s each, scores from "
        f"{fmt.figures(low)} to {fmt.figures(high)}; {total - kept} of {total} {unit}s are marked as removed."
    )
    if widths:
        shares = [row.kept / row.total for row in widths]
        neurons = kinds["feed_forward"]
        text += (
            f" Bars of the width kept by {fmt.plural(neurons.sites, 'feed-forward block')}: {fmt.whole(neurons.kept)} "
            f"of {fmt.whole(neurons.total)} neurons, {fmt.percent(min(shares))} to {fmt.percent(max(shares))} of each."
        )
    if layers := kinds.get("layer"):
        text += f" {wording.of_all(layers)} layers are dropped."
    return text


def _range(heads: Sequence[HeadRow]) -> tuple[float, float]:
    flat = [score for row in heads for score in row.scores]
    return min(flat), max(flat)


def _stride(cell: float, room: float) -> int:
    """Label every n-th cell so that labels have that much room: 1, 2, 4, 8, ..."""
    return 1 if cell >= room else 2 ** math.ceil(math.log2(room / cell))
