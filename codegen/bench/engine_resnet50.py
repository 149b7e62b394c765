"""The ResNet-50 architecture, random weights, from a network of floats to its cycles: how long each step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

from accel_sim.engine import run
from accel_sim.program.check import check_program
from accel_sim.spec import MachineSpec
from codegen.asic_compile.compile import Compiled, compile_graph
from codegen.asic_latency import AsicLatency
from codegen.bench.benchmark import Table
from codegen.bench.resnet50 import write_random
from codegen.events import Events
from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QuantizedGraph
from codegen.quantized.quantize import Calibration, quantize
from codegen.simulate.machine import parse_machine

T = TypeVar("T")

GOAL_S = 60.0
"""The engine's timing mode has to stay below it."""


@dataclass(frozen=True)
class EngineResnet50:
    """``target``: the machine. Quantized on two random images: its cycles do not depend on values."""

    target: str = "asic"
    seed: int = 0

    name: ClassVar[str] = "engine-resnet50"

    def run(self, events: Events) -> dict[str, Any]:
        """Seconds of each step, by the wall and of this process's CPU, and what the engine says."""
        spec = parse_machine(self.target).spec
        _warm(spec)
        steps: list[dict[str, Any]] = []

        def step(name: str, action: Callable[[], T]) -> T:
            with events.stage(name):
                wall, cpu = time.perf_counter(), time.process_time()
                found = action()
                steps.append(
                    {"step": name, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
                )
            return found

        with TemporaryDirectory(prefix="rankc-") as name:
            model, quantized = Path(name) / "resnet50.onnx", Path(name) / "quantized.onnx"
            write_random(model, self.seed)

            def read() -> QuantizedGraph:
                quantize(model, quantized, method=Calibration.MINMAX, random_count=2, seed=self.seed)
                return read_qdq(quantized)

            graph = step("read and quantize", read)
            compiled: Compiled = step("compile", lambda: compile_graph(graph, spec, AsicLatency(spec)))
            program = compiled.program
            step("check", lambda: check_program(program, spec))
            result = step("engine, timing mode", lambda: run(program, spec, {}, values=False))
        return {
            "machine": spec.name,
            "goal_seconds": GOAL_S,
            "steps": steps,
            "cycles": result.cycles,
            "predicted_cycles": compiled.predicted_cycles,
            "energy_pj": result.energy_pj,
            "dram_bytes": result.counts.dram_bytes,
            "macs": result.macs,
            "utilization": result.utilization,
            "layers": len(result.layers),
            "instructions": len(program.code),
            "kinds": {"seconds": "measured", "cycles": "simulated"},
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        rows = [(s["step"], f"{s['seconds']:.2f}", f"{s['cpu_seconds']:.2f}") for s in result["steps"]]
        wall, cpu = (sum(s[key] for s in result["steps"]) for key in ("seconds", "cpu_seconds"))
        rows.append(("in all", f"{wall:.2f}", f"{cpu:.2f}"))
        title = (
            f"ResNet-50 on {result['machine']}: {result['cycles']:,} cycles (price list "
            f"{result['predicted_cycles']:,}), {result['layers']} layers, {result['instructions']:,} instructions"
        )
        return [Table(title, ("step", "seconds", "CPU seconds"), tuple(rows))]


def _warm(spec: MachineSpec) -> None:
    """Compiles the kernels, so that a first run on a machine and the next ones show the same."""
    from codegen.bench.asic_engine import random_graphs

    prices = AsicLatency(spec)
    for graph in random_graphs(2, 0):
        program = compile_graph(graph, spec, prices).program
        check_program(program, spec)
        run(program, spec, {}, values=False)
