"""What the report's plots are drawn with: the palette, a linear axis, and matplotlib's SVG backend measured in pixels.

Colours are written as `var(--name, #light)`, so one drawing serves light and dark pages and still works on its own.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon, Rectangle

from slimheads.errors import UsageError

# Name -> (light, dark). Blue and orange are told apart by all common kinds of colour blindness; the ramp rises in
# lightness alone, towards the page's ink, so that it reads the same in print and in grey.
PALETTE = {
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#16202a", "#e8ecf0"),
    "muted": ("#566270", "#a3aeba"),
    "rule": ("#dbe1e7", "#313a44"),
    "slim": ("#0b6aa8", "#63b7ea"),
    "dense": ("#8794a1", "#7d8a97"),
    "limit": ("#b04a00", "#f2a154"),
    "pass": ("#0c6b50", "#5cc9a5"),
    "fail": ("#a62f1b", "#f39180"),
    "panel": ("#f5f7f9", "#1b2128"),
}
RAMP_ENDS = (((226, 234, 241), (9, 58, 98)), ((38, 50, 62), (164, 216, 247)))
RAMP_STEPS = 16


def _mix(ends: tuple[tuple[int, int, int], tuple[int, int, int]], share: float) -> str:
    low, high = ends
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


PALETTE |= {
    f"heat{step}": (_mix(RAMP_ENDS[0], step / (RAMP_STEPS - 1)), _mix(RAMP_ENDS[1], step / (RAMP_STEPS - 1)))
    for step in range(RAMP_STEPS)
}
# matplotlib wants real colours: each name is drawn in a stand-in that no palette uses, and put back in the SVG's text.
_STAND_IN = {name: f"#0102{index:02x}" for index, name in enumerate(PALETTE)}
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
SMALL, TEXT = 11.0, 12.5  # px
PICTURES = (".svg", ".png")


def palette_css(dark: bool) -> str:
    """The palette as CSS custom properties, for a `:root` rule."""
    return "; ".join(f"--{name}: {colours[1 if dark else 0]}" for name, colours in PALETTE.items())


class Axis:
    """A linear scale from values to pixels, with a margin at both ends."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end
        self.decimals = 2  # of the tick labels, set with the ticks

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most that many round values inside the scale."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)
        self.decimals = max(0, -math.floor(math.log10(step)))
        first = math.ceil(self.low / step)
        return [round(index * step, 10) for index in range(first, math.floor(self.high / step) + 1)]


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


class Canvas:
    """matplotlib's SVG backend as a sheet measured in CSS pixels, y downwards.

    A drawing for a page takes the page's colours and font; a drawing for a file of its own (`file`) has its own.
    """

    def __init__(self, width: float, height: float, name: str, *, file: bool = False) -> None:
        self.width, self.height, self.name = width, height, name
        self._colours = _LIGHT if file else _STAND_IN
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # one SVG unit is one pixel
        self.figure.patch.set_visible(False)
        self.drawn = 0
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.set_axis_off()

    def _add(self, artist: Line2D | Polygon | Rectangle | Circle) -> None:
        artist.set_clip_on(False)
        self.drawn += 1
        artist.set_zorder(self.drawn)  # what is drawn later lies on top, whatever its kind
        self.axes.add_artist(artist)
        artist.set_clip_path(None)

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        *,
        fill: str | None = None,
        stroke: str | None = None,
        gid: str | None = None,
    ) -> None:
        face, edge = self._colours[fill] if fill else "none", self._colours[stroke] if stroke else "none"
        self._add(Rectangle((x, y), w, h, facecolor=face, edgecolor=edge, linewidth=1.0, gid=gid))

    def line(self, x0: float, y0: float, x1: float, y1: float, *, colour: str, weight: float = 1.0) -> None:
        self._add(Line2D([x0, x1], [y0, y1], color=self._colours[colour], linewidth=weight, solid_capstyle="butt"))

    def path(self, points: Sequence[tuple[float, float]], *, colour: str, weight: float = 1.0) -> None:
        """A line through the points."""
        xs, ys = zip(*points, strict=True)
        self._add(Line2D(xs, ys, color=self._colours[colour], linewidth=weight, solid_joinstyle="round"))

    def dot(
        self, x: float, y: float, radius: float, *, fill: str, stroke: str | None = None, gid: str | None = None
    ) -> None:
        edge = self._colours[stroke] if stroke else "none"
        self._add(Circle((x, y), radius, facecolor=self._colours[fill], edgecolor=edge, linewidth=1.6, gid=gid))

    def diamond(self, x: float, y: float, size: float) -> None:
        corners = [(x, y - size), (x + size, y), (x, y + size), (x - size, y)]
        self._add(Polygon(corners, facecolor=self._colours["paper"], edgecolor=self._colours["limit"], linewidth=1.6))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        align: str = "left",
        colour: str = "ink",
        bold: bool = False,
        paper: bool = False,
    ) -> None:
        """One line, centred on y; `paper` lays it on a patch of the page's colour."""
        box = {"facecolor": self._colours["paper"], "edgecolor": "none", "pad": 0.5} if paper else None
        self.drawn += 1
        self.axes.text(
            x,
            y,
            text,
            ha=align,
            va="center_baseline",
            color=self._colours[colour],
            fontsize=TEXT if bold else SMALL,
            fontweight="bold" if bold else "normal",
            parse_math=False,
            bbox=box,
            zorder=self.drawn,
        )

    def svg(self, description: str) -> str:
        """The drawing as an `<svg>` element for a page: no prologue, fonts or dates; its ids start with its name."""
        out = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "slimheads", "path.simplify": False}):
            FigureCanvasSVG(self.figure).print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        text = out.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.S)  # its rule for all lines of all pages
        text = re.sub(r'<g id="(?:patch|line2d|text)_\d+">\s*(<(path)[^>]*/>)\s*</g>', r"\1", text)
        text = re.sub(r"<!--.*?-->\s*", "", text)
        text = re.sub(r"<[^>]*>", _round, text)
        text = re.sub(r"\n\s*", "\n", text)
        text = re.sub(r"font: ((?:bold |700 )?)([\d.]+px)[^;\"]*", _font, text)  # matplotlib up to 3.9
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # later ones
        text = (
            text.replace(' id="', f' id="{self.name}-')
            .replace('"#', f'"#{self.name}-')
            .replace("(#", f"(#{self.name}-")
        )
        for name, stand_in in _STAND_IN.items():
            text = text.replace(stand_in, f"var(--{name}, {PALETTE[name][0]})")
        label = html.escape(description, quote=True)
        opening = f'<svg role="img" aria-label="{label}" viewBox="0 0 {self.width:g} {self.height:g}" class="plot">'
        return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()

    def write(self, path: Path, description: str) -> None:
        """The drawing as a file of its own, .svg or .png by the path's ending (twice as many dots as pixels).

        Raises:
            UsageError: the file cannot be written.
        """
        self.figure.patch.set(visible=True, facecolor=_LIGHT["paper"])
        try:
            if path.suffix.lower() == ".png":
                self.figure.set_dpi(144)
                FigureCanvasAgg(self.figure).print_png(path, metadata={"Description": description, "Software": None})
                return
            size = f'xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}"'
            text = self.svg(description).replace("<svg ", f'<svg {size} font-family="sans-serif" ', 1)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            hint = "name another file"
            raise UsageError(f"the picture cannot be written ({error.strerror})", where=str(path), hint=hint) from error


def _round(tag: re.Match[str]) -> str:
    """Coordinates to a hundredth of a pixel, which halves the page; text between tags keeps its digits."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag[0])


def _font(found: re.Match[str]) -> str:
    """Keep size and weight; the page's own font is inherited."""
    weight = "; font-weight: 650" if found[1] else ""
    return f"font-size: {found[2]}{weight}"
