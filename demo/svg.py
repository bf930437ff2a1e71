"""The few marks of SVG that the picture is made of. Coordinates are pixels, from the top left corner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

INK, FAINT, RULE = "#1f2933", "#66727f", "#dde2e7"

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """From values to pixels. ``low`` must be above zero on a logarithmic scale."""

    low: float
    high: float
    first: float
    last: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; what lies outside is drawn at the edge."""
        value = min(self.high, max(self.low, value))
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def document(width: int, height: int, marks: Iterable[str]) -> str:
    """A whole picture on white ground."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"13\">"
    )
    return "\n".join([head, rectangle(0, 0, width, height, "#ffffff"), *marks, "</svg>", ""])


def text(at: Point, words: str, *, fill: str = INK, size: int = 13, bold: bool = False, anchor: str = "start") -> str:
    """Words on a line that begins (or ends, or has its middle) there, with a white edge that keeps lines off them."""
    weight = ' font-weight="600"' if bold else ""
    edge = 'stroke="#ffffff" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'
    return (
        f'<text x="{at[0]:g}" y="{at[1]:g}" fill="{fill}" font-size="{size}" text-anchor="{anchor}"{weight} {edge}>'
        f"{escape(words)}</text>"
    )


def rectangle(left: float, top: float, width: float, height: float, fill: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>'


def line(start: Point, end: Point, stroke: str = RULE, *, width: float = 1, dashes: str = "") -> str:
    """A straight line."""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    path = f"M{start[0]:g} {start[1]:g}L{end[0]:g} {end[1]:g}"
    return f'<path d="{path}" stroke="{stroke}" stroke-width="{width:g}"{dashed}/>'


def curve(points: Sequence[Point], stroke: str, *, width: float = 2) -> str:
    """A line through points; nothing if there are fewer than two."""
    if len(points) < 2:
        return ""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}" stroke-linejoin="round"/>'


def area(points: Sequence[Point], floor: float, fill: str) -> str:
    """The area between points and a floor; nothing if there are fewer than two."""
    if len(points) < 2:
        return ""
    path = f"M{points[0][0]:g} {floor:g}L" + "L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="{path}L{points[-1][0]:g} {floor:g}Z" fill="{fill}" fill-opacity="0.18"/>'


def dots(points: Iterable[Point], fill: str, diameter: float) -> str:
    """Many dots as one mark; of those that fall on the same half pixel, one is drawn."""
    distinct = sorted({(round(2 * x) / 2, round(2 * y) / 2) for x, y in points})
    path = "".join(f"M{x:g} {y:g}h0" for x, y in distinct)
    return f'<path d="{path}" stroke="{fill}" stroke-width="{diameter:g}" stroke-linecap="round"/>' if path else ""


def legend(at: Point, entries: Iterable[tuple[str, str]]) -> str:
    """Coloured squares with their meaning, in a row that ends there. One text, so that it fits in every font."""
    keys = "\N{EM SPACE}".join(
        f'<tspan fill="{colour}" stroke="{FAINT}" stroke-width="0.6">■</tspan> {escape(meaning)}'
        for colour, meaning in entries
    )
    return f'<text x="{at[0]:g}" y="{at[1]:g}" fill="{FAINT}" font-size="12" text-anchor="end">{keys}</text>'
