"""report.html: one file that needs nothing else, made from the dict of report.json."""

from __future__ import annotations

from functools import cache
from pathlib import PurePath
from typing import Any

import jinja2

from codegen.report import numbers
from codegen.report.recovery import curve_svg, score
from codegen.report.timeline import timeline_svg

NAMES = {
    "latency": "latency",
    "energy": "energy",
    "macs": "MACs",
    "params": "parameters",
    "size": "size",
    "accuracy": "accuracy",
}
"""Metrics in the order of the summary, and what people call them."""

METRICS = tuple(NAMES)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("codegen", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["filename"] = lambda path: PurePath(path).name
    environment.filters["change"] = numbers.change
    environment.filters["ratio"] = numbers.ratio
    environment.filters["quantity"] = numbers.quantity
    environment.filters["duration"] = numbers.duration
    environment.filters["score"] = score
    return environment.get_template("report.html.j2")


def to_html(report: dict[str, Any]) -> str:
    """The text of report.html."""
    largest = max((layer["latency_before"] or 0 for layer in report["layers"]), default=0)
    largest = max(largest, max((layer["latency_after"] or 0 for layer in report["layers"]), default=0))
    bars = [
        {
            **layer,
            "before_percent": 100 * (layer["latency_before"] or 0) / largest if largest else 0,
            "after_percent": 100 * (layer["latency_after"] or 0) / largest if largest else 0,
        }
        for layer in report["layers"]
    ]
    summary = [
        (metric, report["baseline"][metric], report["result"][metric]) for metric in METRICS if report["result"][metric]
    ]
    timeline = None if report["program"] is None else timeline_svg(report["program"]["layers"])
    curve = None if report["recovery"] is None else curve_svg(report["recovery"])
    text = _template().render(report=report, summary=summary, layers=bars, names=NAMES, timeline=timeline, curve=curve)
    return text + "\n"
