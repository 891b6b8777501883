"""Every sample of a measurement over time, so that anyone can see what the machine did while it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slimheads import formatting as fmt
from slimheads.latency.records import Interval, Latency
from slimheads.latency.sampling import Floats
from slimheads.report import wording
from slimheads.report.svg import Axis, Canvas

WIDTH = 960.0  # px
_HEAD, _PANEL, _FOOT = 40.0, 220.0, 26.0
_COLOURS = ("dense", "slim", "limit")  # of the two files and of the control


def write_timeline(rows: Sequence[Latency], path: Path, names: tuple[str, str] = ("dense", "slim")) -> None:
    """Draw the samples of every row that was measured, a panel a row, to an .svg or .png file.

    Args:
        rows: as `bench` gives them; rows that were read back from JSON have no samples.
        path: where to; an existing file is replaced.
        names: of the two files.

    Raises:
        UsageError: the file cannot be written.
    """
    measured = [row for row in rows if row.samples]
    canvas = Canvas(WIDTH, _HEAD + _PANEL * max(1, len(measured)), "timeline", file=True)
    _legend(canvas, names)
    for index, row in enumerate(measured):
        _panel(canvas, row, _HEAD + index * _PANEL)
    if not measured:
        canvas.text(0, _HEAD + 20, "nothing was measured", colour="muted")
    said = "; ".join(wording.latency_line(row) for row in measured) or "nothing was measured"
    canvas.write(path, f"Samples of {names[0]}, {names[1]} and the control over time. {said}.")


def _legend(canvas: Canvas, names: tuple[str, str]) -> None:
    x = 8.0
    for label, colour in zip((*names, f"control: {names[0]} once more"), _COLOURS, strict=True):
        canvas.line(x, 14, x + 18, 14, colour=colour, weight=2.5)
        canvas.text(x + 24, 14, label)
        x += 54 + 6.4 * len(label)


def _panel(canvas: Canvas, row: Latency, top: float) -> None:
    assert row.samples is not None
    roles = [np.array(times) for times in (row.samples.dense, row.samples.slim, row.samples.control)]
    left, right, bottom = 64.0, WIDTH - 8, top + _PANEL - _FOOT
    axis = _scale(np.concatenate([times.ravel() for times in roles]), bottom, top + 30)
    canvas.text(8, top + 8, wording.latency_place(row), bold=True)
    canvas.text(right, top + 8, f"{_found(row)} · {wording.latency_setup(row)}", align="right", colour="muted")
    for tick in axis.ticks(5):
        canvas.line(left, axis(tick), right, axis(tick), colour="rule")
        canvas.text(left - 8, axis(tick), f"{tick:.{axis.decimals}f} ms", align="right", colour="muted")
    sets = len(roles[0])
    room = (right - left) / sets
    for number in range(sets):
        start = left + number * room
        if number:
            canvas.line(start, top + 30, start, bottom, colour="rule")
        for times, colour in ((roles[2], _COLOURS[2]), (roles[0], _COLOURS[0]), (roles[1], _COLOURS[1])):
            points = _points(times[number], start + 3, start + room - 3)
            canvas.path([(x, max(axis(value), top + 30)) for x, value in points], colour=colour, weight=1.1)
        if number % max(1, round(24 / room)) == 0:
            canvas.text(start + room / 2, bottom + 12, str(number + 1), align="center", colour="muted")
    canvas.text(8, bottom + 12, "set", colour="muted")
    above = sum(int((times > axis.high).sum()) for times in roles)
    if above:
        canvas.text(right, top + 24, f"{fmt.plural(above, 'sample')} above the scale", align="right", colour="limit")


def _found(row: Latency) -> str:
    if row.speedup is None or row.control is None:
        return row.verdict
    return f"{_span(row.speedup)}, control {_span(row.control)}: {row.verdict}"


def _span(interval: Interval) -> str:
    estimate, low, high = wording.span(interval)
    return f"{estimate}x ({low} to {high})"


def _scale(times: Floats, bottom: float, top: float) -> Axis:
    """From the quickest sample to the slowest, or to where all but a hundredth lie: a hiccup would flatten the rest."""
    low, most, slowest = float(times.min()), float(np.percentile(times, 99)), float(times.max())
    return Axis(low, slowest if slowest - low < 2 * (most - low) else most, bottom, top)


def _points(times: Floats, start: float, end: float) -> list[tuple[float, float]]:
    """Samples in order from start to end, px; the least and the greatest of each two pixels where they are many."""
    columns = max(1, int((end - start) / 2))
    if len(times) <= 2 * columns:
        place = np.linspace(start, end, len(times)) if len(times) > 1 else [(start + end) / 2]
        return [(float(x), float(value)) for x, value in zip(place, times, strict=True)]
    points = []
    for x, part in zip(np.linspace(start, end, columns), np.array_split(times, columns), strict=True):
        ends = (part.min(), part.max()) if part.argmin() < part.argmax() else (part.max(), part.min())
        points += [(float(x), float(value)) for value in ends]
    return points
