"""What a recovery came to, as report.json has it, and its learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640.0, 160.0, 56.0, 20.0


@dataclass(frozen=True)
class EpochRow:
    """``epoch`` counts from 1; ``held_out`` is the score on held-out samples after it, ``seconds`` its own."""

    epoch: int
    loss: float
    lr: float
    held_out: float
    seconds: float


@dataclass(frozen=True)
class RecoveryReport:
    """Training after the rewriting. ``best_epoch`` is the one whose weights were kept, 0 the start.

    ``measure``: "accuracy", or "-error", minus the distance of the outputs from the dense network's; ``before``,
    ``after`` and ``dense`` are that on ``held_out`` samples that were trained on by none of them in this run.
    """

    epochs: int
    best_epoch: int
    measure: str
    before: float
    after: float
    dense: float | None
    samples: int
    held_out: int
    seconds: float
    device: str
    precision: str
    processes: int
    aligned: tuple[str, ...]
    normalized: tuple[str, ...]
    options: dict[str, Any]
    curve: tuple[EpochRow, ...]


def score(value: float, measure: str) -> str:
    """A held-out score for people: an accuracy in percent, or the error that it is minus of."""
    return f"{100 * value:.2f} %" if measure == "accuracy" else f"error {-value:.3g}"


def curve_svg(recovery: dict[str, Any]) -> Markup:
    """Held-out score (a line) and training loss (a paler one, on a scale of its own) by epoch, the start included."""
    rows = recovery["curve"]
    if not rows:
        return Markup("")
    scores = [recovery["before"], *(row["held_out"] for row in rows)]
    losses = [row["loss"] for row in rows]
    dense = recovery["dense"]
    low, high = _range([*scores, *([] if dense is None else [dense])])
    step = (_WIDTH - _LEFT) / len(rows)
    parts = [
        Markup('<svg viewBox="0 0 {} {}" width="100%" role="img" aria-label="Learning curve">').format(
            _WIDTH, _HEIGHT + _BOTTOM
        )
    ]
    least, most = _range(losses)
    parts.append(_line([(_LEFT + step * (i + 1), _y(v, least, most)) for i, v in enumerate(losses)], "var(--before)"))
    if dense is not None:
        parts.append(
            _line([(_LEFT, _y(dense, low, high)), (_WIDTH, _y(dense, low, high))], "currentColor", dashed=True)
        )
    parts.append(_line([(_LEFT + step * i, _y(v, low, high)) for i, v in enumerate(scores)], "var(--after)"))
    best = recovery["best_epoch"]
    parts.append(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="var(--after)"><title>epoch {}: {}</title></circle>').format(
            _LEFT + step * best, _y(scores[best], low, high), best, score(scores[best], recovery["measure"])
        )
    )
    for value in (low, high):
        parts.append(_label(0, _y(value, low, high) + 4, score(value, recovery["measure"])))
    parts.append(_label(_LEFT, _HEIGHT + _BOTTOM - 4, "start"))
    parts.append(_label(_WIDTH - 64, _HEIGHT + _BOTTOM - 4, f"epoch {rows[-1]['epoch']}"))
    parts.append(Markup("</svg>"))
    return Markup("\n").join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y(value: float, low: float, high: float) -> float:
    return 8 + (_HEIGHT - 16) * (high - value) / (high - low)


def _line(points: Sequence[tuple[float, float]], color: str, *, dashed: bool = False) -> Markup:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2"{}/>').format(
        text, color, Markup(' stroke-dasharray="4 4"') if dashed else ""
    )


def _label(x: float, y: float, text: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" font-size="12" fill="currentColor">{}</text>').format(x, y, text)
