"""A picture of a program's run: a bar per queue, cut into layers, each part busy and waiting in proportion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

_WIDTH, _BAR, _GAP, _LABEL = 1000.0, 16, 6, 64
_QUEUES = ("load", "execute", "store")


def timeline_svg(layers: Sequence[dict[str, Any]]) -> Markup:
    """The layers of report.json's program, from left to right, as wide as they are long; a tooltip names each."""
    total = sum(layer["cycles"] for layer in layers)
    if not total:
        return Markup("")
    height = len(_QUEUES) * (_BAR + _GAP)
    parts = [
        Markup('<svg viewBox="0 0 {} {}" width="100%" role="img" aria-label="Timeline of the program">').format(
            _WIDTH + _LABEL, height
        )
    ]
    for row, queue in enumerate(_QUEUES):
        y = row * (_BAR + _GAP)
        parts.append(
            Markup('<text x="0" y="{}" font-size="12" fill="currentColor">{}</text>').format(y + _BAR - 4, queue)
        )
        at = 0
        for layer in layers:
            x, width = _LABEL + _WIDTH * at / total, _WIDTH * layer["cycles"] / total
            busy = layer["waits"].get(queue, {}).get("busy", 0)
            share = busy / layer["cycles"] if layer["cycles"] else 0.0
            title = f"{layer['name']}: {queue} busy {busy} of {layer['cycles']} cycles"
            parts.append(
                Markup(
                    '<g><title>{}</title><rect class="before" x="{:.2f}" y="{}" width="{:.2f}" height="{}"/>'
                    '<rect class="after" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/></g>'
                ).format(
                    *(title, x, y, max(width - 0.5, 0.1), _BAR),
                    *(x, y + _BAR * (1 - share), max(width - 0.5, 0.1), _BAR * share),
                )
            )
            at += layer["cycles"]
    parts.append(Markup("</svg>"))
    return Markup("\n").join(parts)
