"""The price list beside the engine: cycles, DRAM bytes and energy of random layers and chains, and of networks.

The engine runs the compiled programs in timing mode. Its results come from instructions, tokens and transfers; the
price list's from closed forms and an event model of tiles. Nothing is fitted in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accel_sim.engine import run
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from codegen.asic_compile.compile import compile_graph
from codegen.asic_latency import AsicLatency
from codegen.bench.benchmark import MODELS, Table
from codegen.events import Events
from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QConv, QOperation, QSum, QTensor, QuantizedGraph
from passes.core.site import Geometry
from passes.errors import UnsupportedError, UsageError

MACHINES: dict[str, tuple[str, dict[str, str]]] = {
    "edge_16x16": ("edge_16x16", {}),
    "gemmini_16x16": ("gemmini_16x16", {}),
    "tpu_256x256": ("tpu_256x256", {}),
    "12x14, 44 KiB, 4 B/cycle, a request at a time": (
        "edge_16x16",
        {"rows": "12", "columns": "14", "sram_kib": "44", "bytes_per_cycle": "4", "pipelined_requests": "false"},
    ),
    "8x8, single buffers, 3 B/cycle": (
        "edge_16x16",
        {"rows": "8", "columns": "8", "sram_kib": "64", "double_buffered": "false", "bytes_per_cycle": "3"},
    ),
}
"""Presets, and odd ones: blocks that are no multiple of the array's rows, small memories, slow channels."""

NETWORKS = ("resnet20_cifar10_qdq.onnx",)
MEASURES = ("cycles", "dram_bytes", "energy_pj")
_LONGEST = 4
_COMPUTE_BOUND = 0.8
"""The array is busy for this share of a layer's time."""
_ROUNDING = 1e-12
"""Energies are sums of floats; relatively."""


@dataclass(frozen=True)
class AsicEngine:
    """``layers``: how many random layers per machine, and half as many random chains of 2 to 4."""

    models: Path = MODELS
    layers: int = 200
    seed: int = 0

    name: ClassVar[str] = "asic-engine"

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise UsageError("--layers must be at least 1")

    def run(self, events: Events) -> dict[str, Any]:
        """Quantiles of the relative difference engine / price list - 1, by machine and measure; networks by layer."""
        rows = []
        for name, (preset, changes) in MACHINES.items():
            spec = load_spec(preset, changes)
            prices = AsicLatency(spec)
            samples = []
            with events.stage(name, self.layers + self.layers // 2) as progress:
                for graph in random_graphs(self.layers, self.seed):
                    samples += compared(graph, spec, prices)
                    progress.advance()
            rows.append({"machine": name, **_summary(samples)})
        networks = []
        for file in NETWORKS:
            path = self.models / file
            if path.is_file():
                with events.stage(file, None):
                    networks.append(_network(path))
        return {"machines": rows, "networks": networks, "kinds": {"cycles": "simulated"}}

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        rows = []
        for row in result["machines"]:
            for measure in MEASURES:
                found = row[measure]
                shown = (f"{100 * found[key]:.3g} %" for key in ("median", "p99", "worst"))
                rows.append(
                    (f"{row['machine']}: {measure}", str(row["layers"]), f"{100 * found['exact']:.1f} %", *shown)
                )
        columns = ("machine", "layers", "equal", "median difference", "99th percentile", "largest")
        tables = [Table("engine / price list - 1, absolute, by layer", columns, tuple(rows))]
        for network in result["networks"]:
            listed = [
                (layer["name"], *(f"{layer[key]:,}" for key in ("engine_cycles", "predicted_cycles", "priced_cycles")))
                for layer in network["layers"]
                if layer["engine_cycles"] != layer["priced_cycles"]
            ]
            totals = (f"{network[key]:,}" for key in ("engine_cycles", "predicted_cycles", "priced_cycles"))
            title = f"{network['network']}: layers whose price by shapes is another ({len(network['layers'])} layers)"
            header = ("layer", "engine, cycles", "compiler's prediction", "price list")
            tables.append(Table(title, header, (*listed, ("in all", *totals))))
        return tables


def random_graphs(layers: int, seed: int) -> Iterator[QuantizedGraph]:
    """``layers`` networks of one layer and half as many of a chain; every third result gets a residual."""
    rng = np.random.default_rng(seed)
    for number in range(layers + layers // 2):
        length = 1 if number < layers else int(rng.integers(2, _LONGEST + 1))
        yield _graph(rng, length, number % 3 == 0)


def _graph(rng: np.random.Generator, length: int, residual: bool) -> QuantizedGraph:
    """Convolutions of 1 to 5 taps a side, plain, grouped or depthwise, 3 to 512 channels, 4x4 to 56x56."""
    size = int(rng.integers(4, 57)), int(rng.integers(4, 57))
    widths = [int(2 ** rng.uniform(1.6, 9)) for _ in range(length + 1)]
    shape: tuple[int, ...] = (1, widths[0], *size)
    tensors = {"t0": _tensor("t0", shape, rng)}
    operations: list[QOperation] = []
    for i, (channels, filters) in enumerate(pairwise(widths)):
        kind = rng.integers(0, 8) if length == 1 else 2
        groups = 1
        if kind == 0:
            filters = groups = channels
        elif kind == 1:
            groups = int(rng.choice([2, 4, 8]))
            channels, filters = (-(-n // groups) * groups for n in (channels, filters))
        if i == 0 and channels != widths[0]:
            shape = (1, channels, *size)
            tensors["t0"] = _tensor("t0", shape, rng)
        kernel = int(rng.choice([1, 1, 3, 3, 5]))
        stride = int(rng.choice([1, 1, 2])) if length == 1 else 1
        geometry = Geometry((kernel,) * 2, (stride,) * 2, pads=(kernel // 2,) * 4, groups=groups)
        shape = (1, filters, *geometry.output_spatial(shape[2:]))
        weight = np.zeros((filters, channels // groups, kernel, kernel), np.int8)
        bias = np.zeros(filters, np.int32) if rng.integers(0, 2) else None
        name, multipliers = f"t{i + 1}", np.full(filters, 0.001, np.float32)
        tensors[name] = _tensor(name, shape, rng)
        operations.append(QConv(name, "Conv", f"t{i}", name, geometry, weight, bias, multipliers, -128, 127))
    inputs, last = ["t0"], f"t{length}"
    if residual:
        tensors |= {"other": _tensor("other", shape, rng), "sum": _tensor("sum", shape, rng)}
        operations.append(QSum("sum", "Add", last, "other", "sum", 0.5, 0.5, 0.0, -128, 127))
        inputs, last = ["t0", "other"], "sum"
    floats = (True,) * len(inputs)
    return QuantizedGraph(tensors, tuple(operations), tuple(inputs), (last,), floats, (True,), tuple(inputs), (last,))


def _tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> QTensor:
    return QTensor(name, shape, 0.0625, int(rng.integers(-1, 1)), True)


def compared(graph: QuantizedGraph, spec: MachineSpec, prices: AsicLatency) -> list[dict[str, Any]]:
    """Per layer of the compiled network: the engine's and the price list's cycles, DRAM bytes and energy."""
    try:
        found = compile_graph(graph, spec, prices)
    except UnsupportedError:
        return []  # no tiling fits: nothing to compare
    result = run(found.program, spec, {}, values=False)
    rows = {row.marker: row.price for row in reversed(found.rows)}
    samples = []
    for layer in result.layers:
        price = rows[layer.marker]
        samples.append(
            {
                "cycles": (layer.cycles, price.cycles),
                "dram_bytes": (layer.counts.dram_bytes, price.cost.dram_bytes),
                "energy_pj": (layer.energy_pj, price.cost.energy_pj),
                "compute_bound": layer.array_cycles > _COMPUTE_BOUND * layer.cycles,
            }
        )
    return samples


def _summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"layers": len(samples), "compute_bound": sum(s["compute_bound"] for s in samples)}
    bound = np.array([sample["compute_bound"] for sample in samples])
    for measure in MEASURES:
        engine, price = np.array([sample[measure] for sample in samples], float).T
        off = np.abs(engine / price - 1)
        equal = off < _ROUNDING if measure == "energy_pj" else engine == price
        summary[measure] = {
            "exact": float(equal.mean()),
            "median": float(np.median(off)),
            "p99": float(np.quantile(off, 0.99)),
            "worst": float(off.max()),
            "exact_where_compute_bound": float(equal[bound].mean()) if bound.any() else None,
        }
    return summary


def _network(path: Path) -> dict[str, Any]:
    spec = load_spec()
    found = compile_graph(read_qdq(path), spec, AsicLatency(spec))
    result = run(found.program, spec, {}, values=False)
    rows = {row.marker: row.price for row in reversed(found.rows)}
    layers: list[dict[str, Any]] = [
        {
            "name": layer.name,
            "op": layer.op,
            "engine_cycles": layer.cycles,
            "predicted_cycles": layer.predicted_cycles,
            "priced_cycles": rows[layer.marker].cycles if layer.marker in rows else 0,
            "dram_bytes": layer.counts.dram_bytes,
            "energy_pj": layer.energy_pj,
        }
        for layer in result.layers
    ]
    totals = {
        key: sum(layer[key] for layer in layers) for key in ("engine_cycles", "predicted_cycles", "priced_cycles")
    }
    return {"network": path.name, "machine": spec.name, **totals, "layers": layers}
