"""The pictures of a simulation: its roofline, what its units do in time, and a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from accel_sim.engine.trace import Timeline
from codegen.report.numbers import quantity
from codegen.simulate.chart import (
    COLOURS,
    Scale,
    dot,
    frame,
    horizontal_axis,
    line,
    linear,
    logarithmic,
    short,
    svg,
    text,
    vertical_axis,
    vertical_rule,
)
from codegen.simulate.sweep import Axis

_NAMED_POINTS = 5
_MOST_RADIUS, _MANY_RADIUS, _MANY = 16.0, 10.0, 20


def roofline_svg(machine: Mapping[str, Any]) -> Markup:
    """Layers that multiply, under the machine's roof; a mark's area is its share of the cycles. Empty without any."""
    layers = [layer for layer in machine["layers"] if layer["roofline"]["intensity_macs_per_byte"]]
    if not layers:
        return Markup("")
    width, height, left, right, top, bottom = 760.0, 384.0, 60.0, 740.0, 20.0, 344.0
    peak, ridge = machine["peak_macs_per_cycle"], machine["ridge_macs_per_byte"]
    intensities = [layer["roofline"]["intensity_macs_per_byte"] for layer in layers]
    reached = [layer["roofline"]["reached_macs_per_cycle"] for layer in layers]
    x = logarithmic([*intensities, ridge / 2, ridge * 4], left, right)
    y = logarithmic([*reached, peak / 8, peak], bottom, top)
    slope = peak / ridge
    roof = [(x.low, x.low * slope), (ridge, peak), (x.high, peak)]
    if roof[0][1] < y.low:
        roof[0] = (y.low / slope, y.low)
    parts = horizontal_axis(x, top, bottom, "arithmetic intensity, MACs per DRAM byte")
    parts += vertical_axis(y, left, right)
    parts.append(frame(left, top, right, bottom))
    parts.append(line([(x(i), y(m)) for i, m in roof], "var(--ink, #1c2024)"))
    parts.append(text(left, top - 6, f"MACs per cycle; the roof is the array's {peak:,}", kind="soft"))
    most = max(layer["cycles"] for layer in layers)
    largest = _MOST_RADIUS if len(layers) <= _MANY else _MANY_RADIUS
    ordered = sorted(layers, key=lambda layer: -layer["cycles"])
    for layer in ordered:
        at = layer["roofline"]
        share = 100 * at["reached_macs_per_cycle"] / at["attainable_macs_per_cycle"]
        title = (
            f"{layer['name']}: {at['reached_macs_per_cycle']:.4g} of {at['attainable_macs_per_cycle']:.4g} MACs per "
            f"cycle ({share:.0f} %), {at['intensity_macs_per_byte']:.4g} MACs per byte, {layer['cycles']:,} cycles"
        )
        radius = max(largest * math.sqrt(layer["cycles"] / most), 2.5)
        colour = COLOURS[0] if at["side"] == "compute" else COLOURS[1]
        parts.append(dot(x(at["intensity_macs_per_byte"]), y(at["reached_macs_per_cycle"]), radius, colour, title))
    taken: list[tuple[float, float, float]] = []
    for layer in ordered[:_NAMED_POINTS]:
        at, words = layer["roofline"], _ending(layer["name"])
        px, py = x(at["intensity_macs_per_byte"]), y(at["reached_macs_per_cycle"])
        leftward = px > (left + right) / 2
        reach = 6.2 * len(words)
        # Beside the mark, or where that place is taken, a line further down.
        for down in (4.0, 18.0, 32.0):
            begin = px - 20 - reach if leftward else px + 20
            if all(
                abs(py + down - other) >= 13 or begin > last or begin + reach < first for first, last, other in taken
            ):
                taken.append((begin, begin + reach, py + down))
                parts.append(
                    text(px + (-20 if leftward else 20), py + down, words, "end" if leftward else "start", "over")
                )
                break
    return svg(width, height, "Roofline", parts)


def _ending(name: str, most: int = 30) -> str:
    return name if len(name) <= most else "…" + name[-most + 1 :]


def timeline_svg(timeline: Timeline) -> Markup:
    """The share of each piece of time in which each unit works, one strip per unit, and where layers begin."""
    width, left, right, top, strip, gap = 1000.0, 90.0, 990.0, 18.0, 30.0, 8.0
    cycles = float(timeline.edges[-1])
    if not cycles:
        return Markup("")
    used = [i for i, row in enumerate(timeline.busy) if row.any()]
    bottom = top + len(used) * (strip + gap)
    x = Scale(0.0, cycles, left, right)
    step = (right - left) / timeline.busy.shape[1]
    parts: list[Markup] = []
    for name, begin, end in timeline.layers:
        if end - begin < cycles / 400:
            continue
        parts.append(vertical_rule(x(begin), top - 6, bottom))
        room = int((x(end) - x(begin)) / 6.6) - 1
        if room >= 6:
            title = Markup("<g><title>{}</title>{}</g>")
            parts.append(title.format(name, text(x(begin) + 3, top - 6, _ending(name, room), kind="soft")))
    for place, row in enumerate(used):
        floor = top + place * (strip + gap) + strip
        parts.append(text(left - 8, floor - 9, timeline.tracks[row], "end"))
        outline = [f"M{left:.1f} {floor:.1f}"]
        for edge, share in zip(timeline.edges, timeline.busy[row], strict=False):
            outline.append(f"L{x(float(edge)):.1f} {floor - strip * float(share):.1f}h{step:.2f}")
        outline.append(f"L{right:.1f} {floor:.1f}Z")
        parts.append(Markup('<path d="{}" fill="{}"/>').format("".join(outline), COLOURS[place % len(COLOURS)]))
        parts.append(frame(left, floor - strip, right, floor))
    for tick in x.ticks():
        parts.append(text(x(tick), bottom + 8, short(tick), "middle", "soft"))
    parts.append(text((left + right) / 2, bottom + 24, "cycles", "middle", "soft"))
    return svg(width, bottom + 32, "What the units do in time", parts)


_PANELS = (
    ("cycles", "cycles"),
    ("utilization", "array used, %"),
    ("dram_bytes", "DRAM bytes"),
    ("energy", "energy, µJ"),
)
_TIME = ("time", "time, ms")
_FACTORS = {"utilization": 100.0, "energy": 1e-6, "time": 1e3}


def sweep_svg(sweep: Mapping[str, Any]) -> Markup:
    """Four panels over the first axis - cycles, utilization, DRAM bytes, energy - with a line per value of the second.

    Where the clock is swept, time takes the place of cycles.
    """
    axes = [Axis(tuple(axis["keys"]), tuple(axis["values"])) for axis in sweep["axes"]]
    clock = any("clock" in key for axis in axes for key in axis.keys)
    panels = (_TIME, *_PANELS[1:]) if clock else _PANELS
    series = _series(sweep["points"], axes)
    width, height = 900.0, 560.0 + (22.0 if len(axes) > 1 else 0.0)
    parts: list[Markup] = []
    for number, (metric, label) in enumerate(panels):
        left = 64.0 + 450.0 * (number % 2)
        top = 34.0 + 268.0 * (number // 2)
        right, bottom = left + 370.0, top + 190.0
        values = [[(i, _value(p, metric)) for i, p in row if p["totals"] is not None] for row in series]
        y = linear([value for row in values for _, value in row], bottom, top)
        parts += [*vertical_axis(y, left, right), frame(left, top, right, bottom), text(left, top - 8, label)]
        xs = _places(axes[0], left, right)
        for written, x in zip(axes[0].values, xs, strict=True):
            parts += [vertical_rule(x, bottom, bottom + 4), text(x, bottom + 16, written, "middle", "soft")]
        parts.append(text((left + right) / 2, bottom + 32, axes[0].name, "middle", "soft"))
        for row, colour in zip(values, _colours(len(values)), strict=True):
            parts.append(line([(xs[i], y(value)) for i, value in row], colour))
            for i, value in row:
                title = f"{axes[0].name}={axes[0].values[i]}: {short(value)} {label}"
                parts.append(dot(xs[i], y(value), 3, colour, title))
    if len(axes) > 1:
        at = 64.0
        for written, colour in zip(axes[1].values, _colours(len(series)), strict=True):
            words = f"{axes[1].name}={written}"
            parts += [dot(at, height - 12, 4, colour, words), text(at + 9, height - 8, words)]
            at += 30 + 6.4 * len(words)
    return svg(width, height, f"Sweep of {' and '.join(axis.name for axis in axes)}", parts)


def _series(points: Sequence[Mapping[str, Any]], axes: Sequence[Axis]) -> list[list[tuple[int, Mapping[str, Any]]]]:
    """Points by value of the second axis, each with its place on the first."""
    lines = len(axes[1].values) if len(axes) > 1 else 1
    return [list(enumerate(points[number::lines])) for number in range(lines)]


def _places(axis: Axis, left: float, right: float) -> list[float]:
    """Where the values stand: by logarithms where they are numbers, evenly elsewhere."""
    numbers = axis.numbers
    inner = left + 18, right - 18
    if numbers is None or len(numbers) < 2:
        step = (inner[1] - inner[0]) / max(len(axis.values) - 1, 1)
        return [inner[0] + step * i for i in range(len(axis.values))]
    scale = Scale(min(numbers), max(numbers), *inner, log=True)
    return [scale(number) for number in numbers]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _value(point: Mapping[str, Any], metric: str) -> float:
    return float(point["totals"][metric]["value"]) * _FACTORS.get(metric, 1.0)


def caption(sweep: Mapping[str, Any]) -> str:
    """The fastest machine of a sweep, in words."""
    done = [point for point in sweep["points"] if point["totals"] is not None]
    best = min(done, key=lambda point: point["totals"]["time"]["value"])
    changes = ", ".join(f"{key}={value}" for key, value in best["changes"].items())
    return f"fastest: {changes}, {quantity(best['totals']['latency']['value'], 'cycles')}"
