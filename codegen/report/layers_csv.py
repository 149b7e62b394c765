"""layers.csv: one row per conv or linear node, the fields of ``layers`` in report.json."""

from __future__ import annotations

import csv
import io
from typing import Any

COLUMNS = (
    "name",
    "op",
    "choice",
    "rank",
    "latency_before",
    "latency_after",
    "unit",
    "kind",
    "macs_before",
    "macs_after",
    "params_before",
    "params_after",
    "error",
    "formats",
    "reason",
)


def to_csv(report: dict[str, Any]) -> str:
    """The text of layers.csv. Ranks and formats are joined by spaces, unknown values stay empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for layer in report["layers"]:
        joined = {key: " ".join(str(part) for part in layer[key] or ()) for key in ("rank", "formats")}
        writer.writerow({**layer, **joined})
    return out.getvalue()
