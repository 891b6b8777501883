"""What the report's plots are drawn with: the palette, a linear axis, and plain SVG measured in pixels.

Plain SVG, because matplotlib cannot write colours as CSS variables: one drawing serves light and dark pages, and takes
the page's font.
"""

from __future__ import annotations

import html
import math

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
_ANCHORS = {"left": "start", "center": "middle", "right": "end"}


def _mix(ends: tuple[tuple[int, int, int], tuple[int, int, int]], share: float) -> str:
    low, high = ends
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


PALETTE |= {
    f"heat{step}": (_mix(RAMP_ENDS[0], step / (RAMP_STEPS - 1)), _mix(RAMP_ENDS[1], step / (RAMP_STEPS - 1)))
    for step in range(RAMP_STEPS)
}


def text_width(text: str, *, bold: bool = False) -> float:
    """About how wide a text is, px; rather too much than too little."""
    return len(text) * (7.3 if bold else 6.5)


def palette_css(dark: bool) -> str:
    """The palette as CSS custom properties, for a `:root` rule."""
    return "; ".join(f"--{name}: {colours[1 if dark else 0]}" for name, colours in PALETTE.items())


class Axis:
    """A linear scale from values to pixels, with a margin at both ends."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most that many round values inside the scale: place, px, and label."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)
        decimals = max(0, -math.floor(math.log10(step)))
        counted = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [(self(index * step), f"{index * step:.{decimals}f}") for index in counted]


class Drawing:
    """An SVG drawing for the report's page, in CSS pixels, y downwards. Colours are names of the palette."""

    def __init__(self, width: float, height: float, name: str) -> None:
        self.width, self.height, self.name = width, height, name
        self._parts: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, *, fill: str, gid: str | None = None) -> None:
        self._add("rect", x=x, y=y, width=w, height=h, fill=_colour(fill), id=self._id(gid))

    def line(self, x0: float, y0: float, x1: float, y1: float, *, colour: str, weight: float = 1.0) -> None:
        self._add("line", x1=x0, y1=y0, x2=x1, y2=y1, stroke=_colour(colour), stroke_width=weight)

    def dot(
        self, x: float, y: float, radius: float, *, fill: str, stroke: str | None = None, gid: str | None = None
    ) -> None:
        edge = _colour(stroke) if stroke else None
        width = 1.6 if stroke else None
        self._add("circle", cx=x, cy=y, r=radius, fill=_colour(fill), stroke=edge, stroke_width=width, id=self._id(gid))

    def diamond(self, x: float, y: float, size: float) -> None:
        corners = f"{x:.2f},{y - size:.2f} {x + size:.2f},{y:.2f} {x:.2f},{y + size:.2f} {x - size:.2f},{y:.2f}"
        self._add("polygon", points=corners, fill=_colour("paper"), stroke=_colour("limit"), stroke_width=1.6)

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
        """One line, centred on y; `paper` gives the letters a border of the page's colour."""
        weight = {"font_size": 12.5, "font_weight": 650} if bold else {"font_size": 11}
        halo = {"stroke": _colour("paper"), "stroke_width": 4, "paint_order": "stroke"} if paper else {}
        place = {"x": x, "y": y, "text_anchor": _ANCHORS[align], "dominant_baseline": "central"}
        self._add("text", text, **place, fill=_colour(colour), **weight, **halo)

    def svg(self, description: str) -> str:
        """The drawing as an `<svg>` element; its ids start with its name."""
        label, box = html.escape(description), f"0 0 {self.width:g} {self.height:g}"
        opening = f'<svg role="img" aria-label="{label}" viewBox="{box}" class="plot">'
        return "\n".join([opening, *self._parts, "</svg>"])

    def _add(self, tag: str, text: str = "", **attributes: object) -> None:
        written = "".join(
            f' {name.replace("_", "-")}="{f"{value:.6g}" if isinstance(value, float) else value}"'
            for name, value in attributes.items()
            if value is not None
        )
        self._parts.append(f"<{tag}{written}>{html.escape(text)}</{tag}>" if text else f"<{tag}{written}/>")

    def _id(self, gid: str | None) -> str | None:
        return gid and f"{self.name}-{gid}"


def _colour(name: str) -> str:
    return f"var(--{name})"
