"""Small SVG drawing kit: elements with escaped attributes, scales with round ticks, one frame with axes.

Charts are drawn here rather than by a plotting library: the page stays below 0.2 MB instead of 5, follows light and
dark through CSS variables, and needs nothing but the page's own short script for hover values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape

from alignment.reporting.words import MINUS


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element; class_ -> class, stroke_width -> stroke-width, floats to two decimals, None left out, all escaped."""
    written = []
    for key, value in attributes.items():
        if value is None:
            continue
        if isinstance(value, float):
            value = f"{value:.2f}".rstrip("0").rstrip(".")
        written.append(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"')
    inside = Markup("").join(children)
    return Markup(f"<{name}{''.join(written)}>{inside}</{name}>")


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 5 x 10^n apart) inside [low, high], as near to `about` of them as can be."""
    span = high - low
    if about < 1 or span <= 0 or not math.isfinite(span):
        return []
    unit = 10.0 ** math.floor(math.log10(span / about))
    choices = []
    for step in (unit, 2 * unit, 5 * unit, 10 * unit):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        choices.append([i * step for i in range(first, last + 1)])
    return min(choices, key=lambda choice: abs(len(choice) - about))


def tick_labels(values: Sequence[float]) -> list[str]:
    """Equal decimals for all; scientific when the numbers are tiny."""
    largest = max((abs(v) for v in values), default=0.0)
    gap = min((b - a for a, b in pairwise(values)), default=largest) or 1.0
    if 0 < largest < 1e-2:
        exact = (d for d in range(6) if all(abs(float(f"{v:.{d}e}") - v) < gap / 10 for v in values))
        digits = next(exact, 6)
        return [
            "0" if abs(v) < gap / 1e6 else f"{v:.{digits}e}".replace("e-0", "e-").replace("-", MINUS) for v in values
        ]
    if largest >= 10_000:
        return [f"{v / 1000:g}k".replace("-", MINUS) for v in values]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{0.0 if abs(v) < gap / 1e6 else v:.{decimals}f}".replace("-", MINUS) for v in values]


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values with some air, never of zero width; below 0 only where a value is."""
    known = [v for v in values if math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    air = (high - low) * share or max(abs(high) * 0.1, 0.5)
    return low - air if low < 0 else max(low - air, 0.0), high + air


@dataclass(frozen=True)
class Frame:
    """A plot area in viewBox units; x and y are the ranges of the data."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 44
    right: float = 12
    top: float = 26
    bottom: float = 38

    def fx(self, value: float) -> float:
        share = (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        return self.left + share * (self.width - self.left - self.right)

    def fy(self, value: float) -> float:
        share = (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    @property
    def base(self) -> float:
        return self.height - self.bottom

    def axes(self, x_title: str, y_title: str, *, x_about: int = 5, y_about: int = 4, whole_x: bool = False) -> Markup:
        """Grid, tick labels and titles; the y title stands upright at the top left, where it is read first."""
        parts = []
        y_ticks = ticks(*self.y, y_about)
        for value, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
            y = self.fy(value)
            parts.append(tag("line", class_="grid", x1=self.left, x2=self.width - self.right, y1=y, y2=y))
            parts.append(tag("text", escape(text), class_="tick", x=self.left - 7, y=y + 3.5, text_anchor="end"))
        x_ticks = [v for v in ticks(*self.x, x_about) if not whole_x or v == round(v)]
        for value, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
            x = self.fx(value)
            parts.append(tag("line", class_="notch", x1=x, x2=x, y1=self.base, y2=self.base + 4))
            parts.append(tag("text", escape(text), class_="tick", x=x, y=self.base + 16, text_anchor="middle"))
        right = self.width - self.right
        parts.append(tag("line", class_="axis", x1=self.left, x2=right, y1=self.base, y2=self.base))
        parts.append(tag("text", escape(x_title), class_="title", x=right, y=self.height - 4, text_anchor="end"))
        parts.append(tag("text", escape(y_title), class_="title", x=0, y=11))
        return Markup("").join(parts)

    def svg(self, *children: Any, name: str, hover: Any = None, class_: str = "plot") -> Markup:
        """The whole drawing. hover: {"rows": [[x, text, [y or None, ...]], ...]} for values under the pointer."""
        return tag(
            "svg",
            *children,
            class_=class_,
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            role="img",
            aria_label=name,
            data_hover=json.dumps(hover, ensure_ascii=False, separators=(",", ":")) if hover else None,
        )


def path(points: Sequence[tuple[float, float] | None]) -> str:
    """Path data through the points; None breaks the line."""
    commands, pen_down = [], False
    for point in points:
        if point is None:
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        pen_down = True
    return "".join(commands)


def marker(shape: int, x: float, y: float, size: float = 6, **attributes: Any) -> Markup:
    """Circle, square, diamond, triangle ...: a model is told by its shape as well as by its colour."""
    s = size
    match shape % 4:
        case 0:
            return tag("circle", cx=x, cy=y, r=s, **attributes)
        case 1:
            return tag("rect", x=x - 0.9 * s, y=y - 0.9 * s, width=1.8 * s, height=1.8 * s, **attributes)
        case 2:
            ring = [(x, y - 1.3 * s), (x + 1.3 * s, y), (x, y + 1.3 * s), (x - 1.3 * s, y)]
        case _:
            ring = [(x, y - 1.2 * s), (x + 1.15 * s, y + 0.9 * s), (x - 1.15 * s, y + 0.9 * s)]
    return tag("path", d=path(ring) + "Z", **attributes)
