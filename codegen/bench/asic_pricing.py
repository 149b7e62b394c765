"""Prices a second of the accelerator's price list on one core: closed forms, tile events, tiling search, chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from accel_sim.pricing.array import INPUT_STATIONARY, OUTPUT_STATIONARY, WEIGHT_STATIONARY, gemm_cycles_batch
from accel_sim.pricing.layer import Layer, conv_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.price_list import PriceList
from accel_sim.pricing.search import price_layers, price_tilings
from accel_sim.spec_file import load_spec, presets
from codegen.bench.benchmark import Table
from codegen.bench.cpu_time import cpu_time
from codegen.events import Events
from passes.errors import UsageError

GOALS = {"closed form": 1_000_000, "tile events": 100_000, "tiling search": 3_000}
"""Prices a second on one core, of the default machine."""

DEFAULT = "edge_16x16"
_CLOSED_FORMS = ((WEIGHT_STATIONARY, "ws"), (OUTPUT_STATIONARY, "os"), (INPUT_STATIONARY, "is"))
_GEMMS = 200_000


def random_layers(count: int, seed: int) -> list[Layer]:
    """1x1 and 3x3 convolutions of 8 to 512 channels on 7x7 to 56x56, no two alike in all likelihood."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(count):
        channels, filters = (int(width) for width in rng.integers(8, 513, 2))
        size, kernel = int(rng.integers(7, 57)), int(rng.choice((1, 3)))
        pads = (kernel // 2,) * 4
        layers.append(conv_layer(channels, filters, (size, size), (kernel, kernel), pads=pads, bias=False))
    return layers


def random_chains(count: int, seed: int) -> list[tuple[Layer, ...]]:
    """Tucker-2 chains of 3x3 convolutions: 1x1 to the rank, 3x3 at the rank, 1x1 from it."""
    rng = np.random.default_rng(seed)
    chains: list[tuple[Layer, ...]] = []
    for _ in range(count):
        channels, filters = (int(width) for width in rng.integers(16, 513, 2))
        rank, size = int(rng.integers(4, 257)), int(rng.integers(7, 57))
        spatial = (size, size)
        chains.append(
            (
                conv_layer(channels, rank, spatial, (1, 1), bias=False),
                conv_layer(rank, rank, spatial, (3, 3), pads=(1,) * 4, bias=False),
                conv_layer(rank, filters, spatial, (1, 1)),
            )
        )
    return chains


@dataclass(frozen=True)
class AsicPricing:
    """``layers`` random layers; ``repeats`` samples of each figure. Compiling the kernels is not counted."""

    layers: int = 1000
    repeats: int = 7
    seed: int = 0

    name: ClassVar[str] = "asic-pricing"

    def __post_init__(self) -> None:
        if self.layers < 1 or self.repeats < 1:
            raise UsageError("--layers and --repeats must be at least 1")

    def run(self, events: Events) -> dict[str, Any]:
        """Prices a second in CPU time per kind of price and machine, with the goals that are set."""
        layers = random_layers(self.layers, self.seed)
        table = layer_table([layer.row() for layer in layers])
        rows = []
        with events.stage("closed forms", None):
            gemms = np.random.default_rng(self.seed).integers(1, 4096, (_GEMMS, 3))
            machine = machine_record(load_spec(DEFAULT))
            for number, flow in _CLOSED_FORMS:
                price = _closed_form(machine, number, gemms)
                rows.append(self._row("closed form", f"{DEFAULT}, {flow}", _GEMMS, price))
        with events.stage("tile events", None):
            tilings = price_layers(table, machine)
            steps = float(tilings["steps"].mean())
            events_each = lambda: price_tilings(table, machine, tilings)  # noqa: E731
            rows.append(self._row("tile events", DEFAULT, len(layers), events_each, steps))
        for preset in (DEFAULT, *(name for name in presets() if name != DEFAULT)):
            spec = load_spec(preset)
            kind = "tiling search" if spec.row_stationary is None else "mapping search"
            with events.stage(f"{kind}, {preset}", None):
                rows.append(self._row(kind, preset, len(layers), _search(table, machine_record(spec))))
        with events.stage("chains", None):
            chains, spec = random_chains(self.layers // 3 + 1, self.seed), load_spec(DEFAULT)
            known = PriceList(spec)
            searched, cached = (lambda: PriceList(spec).chains(chains)), (lambda: known.chains(chains))
            rows.append(self._row("chains of 3 layers, searched", DEFAULT, len(chains), searched))
            rows.append(self._row("the same, from the cache", DEFAULT, len(chains), cached))
        met = all(row["met"] for row in rows if row["met"] is not None)
        return {"rows": rows, "met": met, "kinds": {"per_second": "measured, CPU time"}}

    def _row(
        self, kind: str, machine: str, count: int, call: Callable[[], object], steps: float | None = None
    ) -> dict[str, Any]:
        taken = cpu_time(call, self.repeats)
        goal = GOALS.get(kind) if machine.startswith(DEFAULT) else None
        per_second = {"median": count / taken.median_s, "low": count / taken.high_s, "high": count / taken.low_s}
        return {
            "prices": kind,
            "machine": machine,
            "count": count,
            "steps": steps,
            "per_second": per_second,
            "goal": goal,
            "met": None if goal is None else per_second["median"] >= goal,
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        rows = []
        for row in result["rows"]:
            rate = row["per_second"]
            goal = "" if row["goal"] is None else f"{row['goal']:,} {'met' if row['met'] else 'MISSED'}"
            rows.append(
                (row["prices"], row["machine"], *(f"{rate[key]:,.0f}" for key in ("median", "low", "high")), goal)
            )
        columns = ("prices a second, one core", "machine", "median", "slowest", "fastest", "goal")
        return [Table(f"{self.repeats} samples each, CPU time", columns, tuple(rows))]


def _closed_form(machine: NDArray[Any], dataflow: int, gemms: NDArray[np.int64]) -> Callable[[], object]:
    return lambda: gemm_cycles_batch(machine, dataflow, gemms)


def _search(table: NDArray[Any], machine: NDArray[Any]) -> Callable[[], object]:
    return lambda: price_layers(table, machine)
