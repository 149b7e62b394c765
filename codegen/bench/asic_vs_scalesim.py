"""The price list and the engine's timing mode against SCALE-Sim 3.0.0: the same layers, CPU time in pairs, cycles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accel_sim.engine import run as run_program
from accel_sim.pricing.array import INPUT_STATIONARY, OUTPUT_STATIONARY, WEIGHT_STATIONARY, gemm_cycles_batch
from accel_sim.pricing.layer import Layer, conv_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.price_list import LayerPrice
from accel_sim.pricing.search import price_layers, price_tilings
from accel_sim.scalesim_compat import output_size, scalesim_counts
from accel_sim.spec_file import load_spec
from codegen.bench.benchmark import Table
from codegen.bench.cpu_time import cpu_time
from codegen.bench.layer_program import layer_program
from codegen.bench.scalesim_environment import ScaleSim, default_folder, make_environment
from codegen.events import Events
from passes.errors import UsageError

GOALS = {"closed form": 1_000_000, "tile events": 1_000_000, "engine": 1_000}
"""SCALE-Sim's CPU time over ours, all layers together."""

LAYERS: tuple[tuple[str, int, int, int, int, int, int, int], ...] = (
    ("Tucker-2 1x1 in", 14, 14, 1, 1, 256, 32, 1),
    ("Tucker-2 3x3", 14, 14, 3, 3, 32, 32, 1),
    ("Tucker-2 1x1 out", 14, 14, 1, 1, 32, 256, 1),
    ("Conv3_s", 56, 56, 1, 1, 64, 128, 2),
    ("Conv4_s", 28, 28, 1, 1, 128, 256, 2),
    ("Conv5_s", 14, 14, 1, 1, 256, 512, 2),
    ("Conv2_1a", 56, 56, 3, 3, 64, 64, 1),
    ("Conv3_1a", 56, 56, 3, 3, 64, 128, 2),
    ("Conv3_1b", 28, 28, 3, 3, 128, 128, 1),
    ("Conv4_1a", 28, 28, 3, 3, 128, 256, 2),
    ("Conv4_1b", 14, 14, 3, 3, 256, 256, 1),
    ("Conv5_1a", 14, 14, 3, 3, 256, 512, 2),
    ("Conv5_1b", 7, 7, 3, 3, 512, 512, 1),
    ("Conv1", 224, 224, 7, 7, 3, 64, 2),
)
"""A chain of rank 32, and ResNet-18 without repetitions, as SCALE-Sim's own topology has it: name, height, width,
kernel height, kernel width, channels, filters, stride."""

_NUMBERS = {"ws": WEIGHT_STATIONARY, "os": OUTPUT_STATIONARY, "is": INPUT_STATIONARY}
_COPIES = 1000


def scalesim_layer(height: int, width: int, r: int, s: int, channels: int, filters: int, stride: int) -> Layer:
    """The layer as SCALE-Sim reads it: no padding, output sizes rounded up, which some zeros at the end make."""
    ends = [(output_size(n, k, stride) - 1) * stride + k - n for n, k in ((height, r), (width, s))]
    return conv_layer(
        *(channels, filters, (height, width), (r, s), (stride, stride)),
        pads=(0, 0, *(max(end, 0) for end in ends)),
        bias=False,
    )


@dataclass(frozen=True)
class AsicVsScalesim:
    """``layers``: the first so many of :data:`LAYERS`, by what SCALE-Sim takes for them. ``scalesim_python``: an
    interpreter that has SCALE-Sim; by default an environment is made in the user's cache."""

    layers: int = len(LAYERS)
    dataflow: str = "ws"
    rows: int = 32
    columns: int = 32
    repeats: int = 7
    scalesim_python: Path | None = None

    name: ClassVar[str] = "asic-vs-scalesim"

    def __post_init__(self) -> None:
        if self.dataflow not in _NUMBERS:
            raise UsageError(f"--dataflow {self.dataflow!r}: there are: {', '.join(_NUMBERS)}")
        if not 1 <= self.layers <= len(LAYERS):
            raise UsageError(f"--layers {self.layers}: there are {len(LAYERS)}")

    def run(self, events: Events) -> dict[str, Any]:
        """CPU seconds per layer of SCALE-Sim and of ours, right after one another; cycles of both."""
        python = self.scalesim_python
        if python is None:
            with events.stage("SCALE-Sim's environment", None):
                python = make_environment(default_folder())
        rows = []
        with ScaleSim(python) as simulator, events.stage("layers", self.layers) as progress:
            for layer in LAYERS[: self.layers]:
                theirs = simulator.run(self.rows, self.columns, self.dataflow, layer)
                rows.append(self._row(layer, theirs))
                progress.advance(1, layer[0])
            versions = simulator.versions
        total = sum(row["scalesim"]["cpu_s"] for row in rows)
        ratios = {}
        for kind in ("closed form", "tile events", "tiling search", "engine"):
            each = sorted(row["scalesim"]["cpu_s"] / row["cpu_s"][kind] for row in rows)
            all_layers = total / sum(row["cpu_s"][kind] for row in rows)
            goal = GOALS.get(kind)
            ratios[kind] = {
                **{"all": all_layers, "least": each[0], "median": float(np.median(each)), "most": each[-1]},
                **{"goal": goal, "met": None if goal is None else all_layers >= goal},
            }
        return {
            "versions": versions,
            "rows": rows,
            "ratios": ratios,
            "cycles_equal": all(row["scalesim"]["compute_cycles"] == row["compat_cycles"] for row in rows),
            "met": all(ratio["met"] for ratio in ratios.values() if ratio["met"] is not None),
            "kinds": {"cpu_s": "measured", "cycles": "simulated"},
        }

    def _row(self, layer: tuple[str, int, int, int, int, int, int, int], theirs: Mapping[str, Any]) -> dict[str, Any]:
        name, height, width, r, s, channels, filters, stride = layer
        ours = scalesim_layer(height, width, r, s, channels, filters, stride)
        m, k, n = output_size(height, r, stride) * output_size(width, s, stride), r * s * channels, filters
        spec = load_spec(
            "edge_16x16", {"rows": str(self.rows), "columns": str(self.columns), "dataflows": self.dataflow}
        )
        machine, number = machine_record(spec), _NUMBERS[self.dataflow]
        gemms = np.tile(np.array([[m, k, n]]), (_COPIES, 1))
        one = layer_table([ours.row()])
        many, best = np.repeat(one, _COPIES), price_layers(one, machine)
        tilings = np.repeat(best, _COPIES)
        program = layer_program(LayerPrice(ours, best[0], False, False, 0.0), (1, r, s), spec)
        seconds = {
            "closed form": cpu_time(lambda: gemm_cycles_batch(machine, number, gemms), self.repeats).median_s / _COPIES,
            "tile events": cpu_time(lambda: price_tilings(many, machine, tilings), self.repeats).median_s / _COPIES,
            "tiling search": cpu_time(lambda: price_layers(one, machine), self.repeats).median_s,
            "engine": cpu_time(lambda: run_program(program, spec, {}, values=False), self.repeats).median_s,
        }
        return {
            "layer": name,
            "gemm": [m, k, n],
            "scalesim": {
                "compute_cycles": theirs["cycles"] - theirs["stall_cycles"],
                "stall_cycles": theirs["stall_cycles"],
                "cpu_s": theirs["cpu_s"],
            },
            "compat_cycles": scalesim_counts(self.dataflow, self.rows, self.columns, m, k, n).cycles,
            "closed_form_cycles": int(gemm_cycles_batch(machine, number, gemms[:1])[0]),
            "price_cycles": int(best[0]["cycles"]),
            "engine_cycles": run_program(program, spec, {}, values=False).cycles,
            "cpu_s": seconds,
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        layers = []
        for row in result["rows"]:
            theirs, seconds = row["scalesim"], row["cpu_s"]
            counts = (theirs["compute_cycles"], row["compat_cycles"], row["closed_form_cycles"], row["price_cycles"])
            times = (seconds["closed form"] * 1e6, seconds["tile events"] * 1e6, seconds["engine"] * 1e6)
            layers.append(
                (
                    row["layer"],
                    *(f"{count:,}" for count in (*counts, row["engine_cycles"])),
                    *(f"{theirs['cpu_s']:.2f}", *(f"{value:,.3f}" for value in times)),
                )
            )
        names = {"closed form": "price list, closed form", "tile events": "price list, tile events"}
        ratios = [
            (
                names.get(kind, kind),
                *(f"{ratio[key]:,.0f}" for key in ("all", "least", "median", "most")),
                "" if ratio["goal"] is None else f"{ratio['goal']:,} {'met' if ratio['met'] else 'MISSED'}",
            )
            for kind, ratio in result["ratios"].items()
        ]
        equal = "equal on every layer" if result["cycles_equal"] else "NOT EQUAL on every layer"
        array = f"{self.rows}x{self.columns} {self.dataflow}"
        return [
            Table(
                f"{array}: cycles; CPU seconds of SCALE-Sim, microseconds of ours; our formula of its is {equal}",
                (
                    *("layer", "SCALE-Sim", "its formula", "closed form", "price list", "engine"),
                    *("SCALE-Sim s", "closed us", "events us", "engine us"),
                ),
                tuple(layers),
            ),
            Table(
                "SCALE-Sim's CPU time over ours",
                ("ours", "all layers", "least", "median", "most", "goal, all layers"),
                tuple(ratios),
            ),
        ]
