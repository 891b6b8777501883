"""Every sample of a measurement over time, to show what the machine did while it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slimheads import formatting as fmt
from slimheads.errors import UsageError
from slimheads.latency.records import Interval, Latency
from slimheads.report import wording
from slimheads.report.svg import PALETTE

PICTURES = (".svg", ".png")
_COLOURS = [PALETTE[name][0] for name in ("dense", "slim", "limit")]  # of the two files and of the control
_STYLE = {
    "axes.formatter.useoffset": False,
    "axes.edgecolor": PALETTE["rule"][0],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.color": PALETTE["rule"][0],
    "svg.fonttype": "none",
    "svg.hashsalt": "slimheads",
    "text.parse_math": False,
    "xtick.color": PALETTE["muted"][0],
    "ytick.color": PALETTE["muted"][0],
}


def require_picture(path: Path) -> None:
    """Refuse a file that a picture cannot be written to, before there is one.

    Raises:
        UsageError: its ending is none of PICTURES, or its folder is missing.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(
            f"pictures are written as {' or '.join(PICTURES)}", where=str(path), hint="name the file with one of these"
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError("there is no such folder to write to", where=str(path), hint="make it, or name another")


def write_timeline(rows: Sequence[Latency], path: Path, names: tuple[str, str] = ("dense", "slim")) -> None:
    """Draw the samples of every measured row, one panel per row, to an .svg or .png file.

    Args:
        rows: as `bench` gives them; rows that were read back from JSON have no samples.
        path: where to; an existing file is replaced.
        names: of the two files.

    Raises:
        UsageError: the file cannot be written.
    """
    measured = [row for row in rows if row.samples]
    said = (
        "; ".join(f"{wording.latency_setup(row)}: {wording.latency_text(row)}" for row in measured)
        or "nothing was measured"
    )
    title = f"Samples of {names[0]}, {names[1]} and the control over time. {said}."
    with matplotlib.rc_context(_STYLE):
        count = max(1, len(measured))
        figure = Figure(figsize=(10, 0.5 + 2.3 * count), layout="constrained")
        lines = [_draw(figure.add_subplot(count, 1, panel), row) for panel, row in enumerate(measured, start=1)]
        if lines:
            labels = (*names, f"control: {names[0]} once more")
            figure.legend(lines[0], labels, loc="outside upper left", ncols=3, frameon=False)
        else:
            figure.text(0.02, 0.5, "nothing was measured")
        metadata = {"Title": title} | ({"Date": None} if path.suffix.lower() == ".svg" else {"Software": None})
        try:
            figure.savefig(path, dpi=144, metadata=metadata)
        except OSError as error:
            hint = "name another file"
            raise UsageError(f"the picture cannot be written ({error.strerror})", where=str(path), hint=hint) from error


def _draw(axes: Any, row: Latency) -> list[Any]:
    """Draw the panel of one row; returns one line of each of the dense, slim and control sessions, for the legend."""
    assert row.samples is not None
    roles = [np.array(times) for times in (row.samples.dense, row.samples.slim, row.samples.control)]
    sets, first = len(roles[0]), []
    for times, colour, order in zip(roles, _COLOURS, (2, 3, 1), strict=True):
        for number, samples in enumerate(times, start=1):
            place = np.linspace(number - 0.48, number + 0.48, len(samples)) if len(samples) > 1 else [number]
            (line,) = axes.plot(place, samples, color=colour, linewidth=0.8, zorder=2 + order)
        first.append(line)
    for number in range(1, sets):
        axes.axvline(number + 0.5, color=PALETTE["rule"][0], linewidth=0.8)
    values = np.concatenate([times.ravel() for times in roles])
    low, most, high = float(values.min()), float(np.percentile(values, 99)), float(values.max())
    if high - low > 2 * (most - low):  # a few slow samples would flatten the rest
        high = most
    margin = 0.08 * (high - low) or 0.05 * high
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0.5, sets + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(min(sets, 30), integer=True))
    axes.set_ylabel("ms", color=PALETTE["muted"][0])
    axes.set_xlabel("set", loc="left", color=PALETTE["muted"][0])
    axes.set_title(wording.latency_place(row), loc="left", fontweight="bold")
    axes.set_title(f"{_found(row)} · {wording.latency_setup(row)}", loc="right", color=PALETTE["muted"][0])
    if above := int((values > high + margin).sum()):
        text = f"{fmt.plural(above, 'sample')} above the scale"
        below = {"xycoords": "axes fraction", "xytext": (0, -24), "textcoords": "offset points"}
        axes.annotate(text, (1, 0), **below, ha="right", va="center", color=_COLOURS[2])
    return first


def _found(row: Latency) -> str:
    if row.speedup is None or row.control is None:
        return row.verdict
    return f"{_span(row.speedup)}, control {_span(row.control)}: {row.verdict}"


def _span(interval: Interval) -> str:
    estimate, low, high = wording.interval_texts(interval)
    return f"{estimate}x ({low} to {high})"
