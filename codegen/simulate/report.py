"""The result as the dict that ``schema.json`` describes, and the layers as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

import jsonschema

from codegen.report.build import tool_versions
from codegen.simulate.roofline import ridge
from codegen.simulate.run import Outcome
from codegen.simulate.simulation import Simulation

SCHEMA_VERSION = 1

KINDS = {
    "cycles": "simulated",
    "predicted_cycles": "simulated",
    "dram_bytes": "simulated",
    "energy_pj": "simulated",
    "stalls": "simulated",
    "host_cycles": "estimated",
    "timings": "measured",
}
"""Where the numbers come from that do not say it themselves."""

QUEUES = ("load", "execute", "store")

COLUMNS = (
    *("target", "source", "name", "op", "unit", "cycles", "predicted_cycles", "host_cycles", "macs", "utilization"),
    *("dram_bytes", "dram_read_bytes", "dram_write_bytes", "energy_pj"),
    *("intensity_macs_per_byte", "attainable_macs_per_cycle", "reached_macs_per_cycle", "side", "on_chip"),
    *("load_busy", "load_buffer", "load_channel", "load_latency", "load_barrier"),
    *("execute_busy", "execute_data", "execute_accumulators", "execute_barrier"),
    *("store_busy", "store_results", "store_channel", "store_latency", "store_barrier"),
)


def to_dict(outcome: Outcome, artifacts: Mapping[str, str]) -> dict[str, Any]:
    """The result as JSON values, validated against the published schema; ``artifacts``: name -> file in the folder."""
    network, config = outcome.network, outcome.config
    report = {
        "schema": SCHEMA_VERSION,
        "tool": tool_versions(),
        "model": {
            "path": str(network.path),
            "sha256": network.sha256,
            "kind": network.kind,
            "ranges": network.ranges,
            "images": network.images,
        },
        "options": {
            "shapes": {name: list(shape) for name, shape in config.shapes.items()},
            "price_list": config.price_list,
            "layer_by_layer": config.layer_by_layer,
            "seed": config.seed,
        },
        "kinds": KINDS,
        "machines": [_machine(simulation) for simulation in outcome.simulations],
        "sweep": _sweep(outcome) if outcome.points else None,
        "outputs": None
        if outcome.outputs is None
        else {
            "source": outcome.outputs.source,
            "samples": outcome.outputs.samples,
            "tensors": [asdict(row) for row in outcome.outputs.rows],
        },
        "artifacts": dict(artifacts),
        "timings": dict(outcome.timings),
        "warnings": list(outcome.warnings),
    }
    plain: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    validate(plain)
    return plain


def _machine(simulation: Simulation) -> dict[str, Any]:
    spec = simulation.spec
    return {
        "target": {"name": simulation.machine.name, "spec": asdict(spec)},
        "source": simulation.source,
        "reason": simulation.reason,
        "peak_macs_per_cycle": spec.peak_macs_per_cycle,
        "ridge_macs_per_byte": ridge(spec),
        "totals": asdict(simulation.totals),
        "stalls": simulation.stalls,
        "layers": [asdict(layer) for layer in simulation.layers],
        "host": [asdict(part) for part in simulation.host],
        "layout_changes": [asdict(change) for change in simulation.layout_changes],
        "notes": list(simulation.notes),
    }


def _sweep(outcome: Outcome) -> dict[str, Any]:
    return {
        "axes": [{"keys": list(axis.keys), "values": list(axis.values)} for axis in outcome.config.axes],
        "points": [
            {
                "changes": dict(point.changes),
                "source": None if point.simulation is None else point.simulation.source,
                "totals": None if point.simulation is None else asdict(point.simulation.totals),
                "error": point.error or None,
            }
            for point in outcome.points
        ],
    }


def to_csv(report: Mapping[str, Any]) -> str:
    """One row per layer and machine; unknown values stay empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for machine in report["machines"]:
        for layer in machine["layers"]:
            waits = {
                f"{queue}_{reason}": cycles
                for queue, reasons in layer["stalls"].items()
                for reason, cycles in reasons.items()
            }
            none = {column: 0 for column in COLUMNS if column.split("_")[0] in QUEUES} if waits else {}
            place = {"target": machine["target"]["name"], "source": machine["source"]}
            writer.writerow({**place, **layer, **layer["roofline"], **none, **waits})
    return out.getvalue()


@cache
def schema() -> dict[str, Any]:
    """The published schema of simulation.json."""
    text = (resources.files("codegen.simulate") / "schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def validate(report: Mapping[str, Any]) -> None:
    """Raises jsonschema.ValidationError for what is no result of schema 1."""
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)


def to_json(report: Mapping[str, Any]) -> str:
    """The text of simulation.json."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
