"""simulation.html: one file that needs nothing else, made from the dict of simulation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

import jinja2

from accel_sim.engine.trace import Timeline
from codegen.report import numbers
from codegen.simulate.plots import caption, roofline_svg, sweep_svg, timeline_svg


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("codegen", "simulate"), jinja2.PackageLoader("codegen", "report")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["filename"] = lambda path: PurePath(path).name
    environment.filters["ratio"] = numbers.ratio
    environment.filters["quantity"] = numbers.quantity
    environment.filters["duration"] = numbers.duration
    return environment.get_template("simulation.html.j2")


def to_html(report: Mapping[str, Any], timelines: Sequence[Timeline | None]) -> str:
    """The text of simulation.html; ``timelines``: one per machine, None where there is no run."""
    machines = [
        {
            **machine,
            "roofline": roofline_svg(machine),
            "timeline": None if timeline is None else timeline_svg(timeline),
        }
        for machine, timeline in zip(report["machines"], timelines, strict=True)
    ]
    sweep = report["sweep"]
    return (
        _template().render(
            report=report,
            machines=machines,
            sweep=sweep,
            sweep_plot=None if sweep is None else sweep_svg(sweep),
            sweep_caption=None if sweep is None else caption(sweep),
        )
        + "\n"
    )
