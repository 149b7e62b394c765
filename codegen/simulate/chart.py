"""What pictures are made of: scales, axes and marks as SVG that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

STYLE = Markup(
    "<style>"
    ".rk text{font:11px system-ui,sans-serif;fill:var(--ink,#1c2024)}"
    ".rk .soft{fill:var(--soft,#60646c)}"
    ".rk .over{paint-order:stroke;stroke:var(--paper,#fff);stroke-width:3px}"
    ".rk .grid{stroke:var(--line,#d9dce1);stroke-width:1}"
    ".rk .frame{stroke:var(--soft,#60646c);stroke-width:1;fill:none}"
    ".rk .paper{fill:var(--paper,#fff)}"
    "</style>"
)
"""Colours of the page around it where that has any, else of its own."""

COLOURS = ("#1f6feb", "#d9730d", "#1a7f37", "#a33ea1", "#b42318", "#0e8a94", "#8a6d00", "#5f6b7a")
_MOST_TICKS = 7


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on a line from ``begin`` to ``end``, in proportion or by logarithms."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round numbers of the range: 1, 2, 5 and their tens; by logarithms only tens where there are many."""
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
            found = [s * 10.0**ten for ten in tens for s in steps if self._holds(s * 10.0**ten)]
            if len(found) <= _MOST_TICKS:
                break
        return found

    def _holds(self, value: float) -> bool:
        return self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)


def _round_step(least: float) -> float:
    ten = 10.0 ** math.floor(math.log10(least))
    return next(step * ten for step in (1.0, 2.0, 5.0, 10.0) if step * ten >= least * (1 - 1e-9))


def linear(values: Iterable[float], begin: float, end: float) -> Scale:
    """From 0 to a little above the largest value."""
    highest = max(values, default=0.0)
    return Scale(0.0, 1.08 * highest if highest > 0 else 1.0, begin, end)


def logarithmic(values: Sequence[float], begin: float, end: float, margin: float = 1.3) -> Scale:
    """From a little below the smallest to a little above the largest value, all above zero."""
    return Scale(min(values) / margin, max(values) * margin, begin, end, True)


def short(value: float) -> str:
    """A tick's label: 0.05, 12, 3.5k, 20M."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * (1 - 1e-9):
            return f"{value / factor:.4g}{prefix}"
    return f"{value:.3g}"


def svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """The whole picture, on the page's paper."""
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="rk" viewBox="0 0 {:g} {:g}" width="100%" role="img" '
        'aria-label="{}" style="max-width:{:g}px">'
    ).format(width, height, label, width)
    paper = Markup('<rect class="paper" width="{:g}" height="{:g}"/>').format(width, height)
    return Markup("\n").join([head, STYLE, paper, *parts, Markup("</svg>")])


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> Markup:
    mark = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>')
    return mark.format(x, y, anchor, Markup(' class="{}"').format(kind) if kind else "", words)


def line(points: Sequence[tuple[float, float]], colour: str, width: float = 1.6, dash: str = "") -> Markup:
    """A line through points of the picture."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = Markup(' stroke-dasharray="{}"').format(dash) if dash else ""
    return Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="{:g}"{}/>').format(
        path, colour, width, dashed
    )


def dot(x: float, y: float, radius: float, colour: str, title: str) -> Markup:
    """A mark with a tooltip."""
    return Markup(
        '<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" fill="{}" fill-opacity="0.75" stroke="{}">'
        "<title>{}</title></circle>"
    ).format(x, y, radius, colour, colour, title)


def horizontal_axis(scale: Scale, top: float, bottom: float, label: str) -> list[Markup]:
    parts = []
    for tick in scale.ticks():
        x = scale(tick)
        parts.append(vertical_rule(x, top, bottom))
        parts.append(text(x, bottom + 14, short(tick), "middle", "soft"))
    parts.append(text((scale.begin + scale.end) / 2, bottom + 29, label, "middle", "soft"))
    return parts


def vertical_axis(scale: Scale, left: float, right: float) -> list[Markup]:
    parts = []
    for tick in scale.ticks():
        y = scale(tick)
        parts.append(
            Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(left, right, y, y)
        )
        parts.append(text(left - 6, y + 4, short(tick), "end", "soft"))
    return parts


def vertical_rule(x: float, top: float, bottom: float) -> Markup:
    return Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(x, x, top, bottom)


def frame(left: float, top: float, right: float, bottom: float) -> Markup:
    return Markup('<rect class="frame" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        left, top, right - left, bottom - top
    )
