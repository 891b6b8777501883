"""The report's plots as inline SVG: latency with its intervals, and drift beside the random control.

Every function takes the width in pixels, because letters in a plot that is only scaled down to a phone cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence

from slimheads import formatting as fmt
from slimheads.data.metrics import Figures
from slimheads.latency.records import Interval, Latency
from slimheads.report import wording
from slimheads.report.svg import Axis, Drawing, text_width
from slimheads.verification.drift import Drift


def latency(rows: Sequence[Latency], *, width: int, name: str) -> str | None:
    """Medians with p10 to p90, and the speedup's interval beside its control; None if nothing was measured."""
    measured = [row for row in rows if row.dense and row.slim and row.speedup]
    if not measured:
        return None
    side_by_side = width > 600
    labels = [(wording.latency_place(row), wording.latency_setup(row)) for row in measured]
    label_w = max(150.0, *(max(text_width(place, bold=True), text_width(setup)) + 8 for place, setup in labels))
    label_w = min(label_w, 290.0) if side_by_side else 0.0
    below = 16.0 if any(text_width(place, bold=True) + text_width(setup) > width for place, setup in labels) else 0.0
    band = 64.0 if side_by_side else 128.0 + below
    head = 52.0 if side_by_side else 62.0
    panel_w = (width - label_w - 40) / 2 if side_by_side else float(width)
    times_x, ratio_x = label_w, (label_w + panel_w + 40 if side_by_side else 0.0)
    spans = [value for row in measured for value in _ratio_values(row)]
    axis = Axis(min([*spans, 1.0]), max([*spans, 1.0]), ratio_x + 6, ratio_x + panel_w - 12)
    longest = max(
        max(row.dense.p90_ms, row.slim.p90_ms) / row.dense.median_ms for row in measured if row.dense and row.slim
    )
    drawing = Drawing(width, head + band * len(measured) + 34, name)
    _latency_legend(drawing, times_x, ratio_x, side_by_side)
    bottom = head + band * len(measured)
    ticks = axis.ticks(5)
    for place, label in ticks:
        drawing.text(place, bottom + 14, f"{label}x", align="center", colour="muted")
    for index, row in enumerate(measured):
        y = head + index * band
        if index:
            drawing.line(0, y - 6, width, y - 6, colour="rule")
        above = -2 if side_by_side else 68 + below  # the ratio's scale does not run through the bars above it
        for place, _ in ticks:
            drawing.line(place, y + above, place, y + band - 10, colour="rule")
        drawing.line(axis(1), y + above, axis(1), y + band - 10, colour="ink", weight=1.2)
        title, note = labels[index]
        if side_by_side:
            drawing.text(0, y + 16, title, bold=True)
            drawing.text(0, y + 33, note, colour="muted")
            _times(drawing, row, times_x, y + 6, panel_w - 66, longest)
            _speedup(drawing, row, axis, y + 24)
        else:
            drawing.text(0, y + 10, title, bold=True, paper=True)
            if below:
                drawing.text(0, y + 26, note, colour="muted", paper=True)
            else:
                drawing.text(width, y + 10, note, align="right", colour="muted", paper=True)
            _times(drawing, row, 0, y + 22 + below, width - 72.0, longest)
            _speedup(drawing, row, axis, y + 90 + below)
    summary = "; ".join(f"{wording.latency_setup(row)}: {wording.latency_text(row)}" for row in measured)
    return drawing.svg(f"Latency of the dense and the slim model, and the speedup with its 95% interval. {summary}.")


def _ratio_values(row: Latency) -> list[float]:
    found = [row.flop_speedup] if row.flop_speedup is not None else []
    for interval in (row.speedup, row.control):
        found += [interval.low, interval.high] if interval else []
    return found


def _latency_legend(drawing: Drawing, times_x: float, ratio_x: float, side_by_side: bool) -> None:
    drawing.text(times_x, 8, "Time per run: median, p10 to p90", bold=True)
    x, y = (times_x, 26.0) if side_by_side else (222.0, 8.0)
    for label in ("dense", "slim"):
        drawing.rect(x, y - 4.5, 9, 9, fill=label)
        drawing.text(x + 14, y, label, colour="muted")
        x += 62
    y = 8.0 if side_by_side else 26.0
    drawing.text(ratio_x, y, "Speedup, 95% interval", bold=True)
    y += 18
    x = ratio_x + 4
    drawing.dot(x, y, 4, fill="slim")
    drawing.text(x + 9, y, "slim", colour="muted")
    drawing.dot(x + 52, y, 3, fill="paper", stroke="dense")
    drawing.text(x + 61, y, "control", colour="muted")
    drawing.diamond(x + 122, y, 5)
    drawing.text(x + 132, y, "FLOP ratio" if not side_by_side else "FLOP-ratio speedup", colour="muted")


def _times(drawing: Drawing, row: Latency, x: float, y: float, room: float, longest: float) -> None:
    """Bars relative to this row's dense median: shapes differ by orders of magnitude and would hide each other."""
    if not (row.dense and row.slim):
        return
    for offset, timing, colour, name in ((0.0, row.dense, "dense", "dense"), (19.0, row.slim, "slim", "slim")):
        scale = room / (longest * row.dense.median_ms)
        middle = y + offset + 8
        drawing.rect(x, middle - 7, timing.median_ms * scale, 14, fill=colour)
        drawing.line(timing.p10_ms * scale + x, middle, timing.p90_ms * scale + x, middle, colour="ink", weight=1.4)
        for end in (timing.p10_ms, timing.p90_ms):
            drawing.line(x + end * scale, middle - 3.5, x + end * scale, middle + 3.5, colour="ink", weight=1.4)
        right = x + max(timing.p90_ms, timing.median_ms) * scale
        drawing.text(right + 7, middle, fmt.milliseconds(timing.median_ms), bold=name == "slim")


def _speedup(drawing: Drawing, row: Latency, axis: Axis, y: float) -> None:
    if row.control:
        _whisker(drawing, row.control, axis, y + 15, "dense", 1.5)
        drawing.dot(axis(row.control.estimate), y + 15, 3, fill="paper", stroke="dense")
    if row.flop_speedup is not None:
        drawing.diamond(axis(row.flop_speedup), y, 5.5)
    if row.speedup:
        _whisker(drawing, row.speedup, axis, y, "slim", 3.0)
        drawing.dot(axis(row.speedup.estimate), y, 4.5, fill="slim")
        text = f"{fmt.ratio(row.speedup.estimate)}" if row.verdict in ("faster", "slower") else row.verdict
        half = text_width(text, bold=True) / 2  # keeps a verdict in words inside the panel
        middle = min(max(axis(row.speedup.estimate), axis.start + half), axis.end - half)
        drawing.text(middle, y - 15, text, align="center", bold=True, paper=True)


def _whisker(drawing: Drawing, interval: Interval, axis: Axis, y: float, colour: str, weight: float) -> None:
    drawing.line(axis(interval.low), y, axis(interval.high), y, colour=colour, weight=weight)


def drift(found: Drift | None, *, width: int, name: str) -> str | None:
    """The slim model's headline figure on one line with each random control; None without a control."""
    if found is None or found.slim is None or found.headline is None or found.random_control is None:
        return None
    pick = found.headline
    slim = _figure(found.slim, pick)
    seeds = [value for one in found.random_control.figures if (value := _figure(one, pick)) is not None]
    if slim is None or not seeds:
        return None
    unchanged = 1.0
    axis = Axis(min([*seeds, slim, unchanged]), max([*seeds, slim, unchanged]), 14, width - 22.0)
    drawing = Drawing(width, 112, name)
    middle = 44.0
    drawing.line(0, middle, width, middle, colour="rule")
    for place, label in axis.ticks(6 if width > 600 else 4):
        drawing.line(place, middle - 4, place, middle + 4, colour="muted")
        drawing.text(place, middle + 20, label, align="center", colour="muted")
    drawing.line(axis(unchanged), middle - 12, axis(unchanged), middle + 12, colour="ink", weight=1.4)
    for value in seeds:
        drawing.dot(axis(value), middle, 5, fill="paper", stroke="limit")
    drawing.dot(axis(slim), middle, 6.5, fill="slim")
    side = "left" if axis(slim) < 60 else "right" if axis(slim) > width - 60 else "center"
    drawing.text(
        axis(slim) + {"left": -6, "right": 6, "center": 0}[side], middle - 22, f"slim {slim:.3f}", align=side, bold=True
    )
    x = 6.0
    random = "random removal, one circle per seed" if width > 600 else "random, one per seed"
    for label, colour, filled in (("slim", "slim", True), (random, "limit", False)):
        drawing.dot(x, 94, 4.5, fill=colour if filled else "paper", stroke=None if filled else colour)
        drawing.text(x + 11, 94, label, colour="muted")
        x += 24 + text_width(label)
    drawing.line(x, 88, x, 100, colour="ink", weight=1.4)
    drawing.text(x + 8, 94, "unchanged", colour="muted")
    values = ", ".join(f"{value:.3f}" for value in seeds)
    return drawing.svg(f"{wording.FIGURE_NAMES[pick]}: slim {slim:.3f}; random removal of as many units: {values}.")


def _figure(figures: Figures, name: str) -> float | None:
    value: float | None = getattr(figures, name)
    return value
