"""From a network of floats to the accelerator's program, and what the engine says of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from accel_sim.engine import Result, run
from accel_sim.program.check import check_program
from accel_sim.spec import MachineSpec
from codegen.asic_compile.compile import Compiled, check_machine, compile_graph
from codegen.asic_compile.run import run_network
from codegen.asic_latency import AsicLatency
from codegen.dataset import Dataset
from codegen.events import Events
from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QuantizedGraph
from codegen.quantized.onnx_network import integer_options
from codegen.quantized.quantize import quantize
from codegen.report.build import Quantity
from codegen.report.program import Agreement, HostCallRow, ProgramLayer, ProgramReport
from passes.core.cost import Cost, Kind
from passes.errors import UnsupportedError
from passes.onnx_surgery import LARGE_BYTES

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class AsicProgram:
    """A network's program and its run on the engine, without values. ``quantized``: the QDQ network it is made from."""

    spec: MachineSpec
    quantized: Path
    graph: QuantizedGraph
    compiled: Compiled
    result: Result
    calibrated: bool

    @property
    def host_cycles(self) -> dict[str, float]:
        """An estimate for each part that the host runs, between the program's layers or behind it, by name."""
        names = [call.name for call in self.compiled.program.calls]
        found = {names[call]: layer.host_cycles for layer in self.result.layers for call in layer.host_calls}
        for part in self.compiled.tail:
            shapes = [self._shape(name) for name in (*part.inputs, *part.outputs)]
            host = self.spec.host
            found[part.name] = host.call_cycles + host.element_cycles * sum(map(prod, shapes))
        return found

    @property
    def options(self) -> onnxruntime.SessionOptions:
        """Of a session that computes the quantized network as the program does."""
        return integer_options(self.graph.signed)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        graph = self.graph
        return (graph.tensors[tensor] if tensor in graph.tensors else graph.host_tensors[tensor]).shape

    @property
    def cost(self) -> Cost:
        """Latency, energy and DRAM bytes; the host's estimated cycles included where it runs any part."""
        host = sum(self.host_cycles.values())
        kind = Kind.ESTIMATED if self.host_cycles else Kind.SIMULATED
        ran = self.result
        return Cost(latency=ran.cycles + host, energy_pj=ran.energy_pj, dram_bytes=ran.counts.dram_bytes, kind=kind)


def is_quantized(model: Path) -> bool:
    """Whether a network holds QuantizeLinear or DequantizeLinear."""
    return _is_quantized(_header(model))


def _header(model: Path) -> onnx.ModelProto:
    """The network without its external data."""
    return onnx.load(model, load_external_data=False)


def _is_quantized(header: onnx.ModelProto) -> bool:
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in header.graph.node)


def _file_bytes(model: Path, header: onnx.ModelProto) -> int:
    """What a network's file and those of its external data take, as far as they are there."""
    places = {e.value for tensor in header.graph.initializer for e in tensor.external_data if e.key == "location"}
    files = [model, *(model.parent / place for place in places)]
    return sum(path.stat().st_size for path in files if path.is_file())


def make_program(
    model: Path,
    quantized: Path,
    spec: MachineSpec,
    prices: AsicLatency,
    calibration: Dataset | None,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    events: Events,
) -> AsicProgram:
    """The checked program of the network at ``model`` for one sample, timed on the engine.

    A network of floats is quantized to ``quantized`` first, on ``calibration`` or, where that is None, on random
    inputs, which is good for its cycles alone. Raises UnsupportedError where the machine or the network has none.
    """
    check_machine(spec)
    header = _header(model)
    size = _file_bytes(model, header)
    if size >= LARGE_BYTES:
        raise UnsupportedError(
            f"{model.name} has {size / 2**20:.0f} MiB of weights, and quantizing holds a network several times in "
            f"memory: programs are made of networks below {LARGE_BYTES / 2**20:.0f} MiB"
        )
    calibrated = calibration is not None
    if _is_quantized(header):
        quantized, calibrated = model, True
    else:
        with events.stage("quantize", None if calibration is None else len(calibration)) as progress:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                progress.advance(count - done)
                done = count

            quantize(model, quantized, calibration, shapes=shapes, seed=seed, progress=advance, random_count=2)
    with events.stage("compile the program"):
        graph = read_qdq(quantized, shapes)
        compiled = compile_graph(graph, spec, prices)
        check_program(compiled.program, spec)
    with events.stage("run the program"):
        result = run(compiled.program, spec, {}, values=False)
    return AsicProgram(spec, quantized, graph, compiled, result, calibrated)


def baseline_cycles(
    model: Path,
    spec: MachineSpec,
    prices: AsicLatency,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    events: Events,
) -> Cost:
    """What the program of ``model`` costs; cycles do not depend on values, so the network is quantized roughly."""
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        return make_program(model, Path(folder) / "baseline.onnx", spec, prices, None, shapes, seed, events).cost


def compare(program: AsicProgram, samples: Sequence[Mapping[str, Array]]) -> tuple[Agreement, list[dict[str, Array]]]:
    """The engine's outputs against those of onnxruntime's integer kernels; and the engine's, by the network's names.

    Byte by byte; what the host computes behind the program counts as different from a relative 1e-5 on. Runs with the
    engine's checks for hazards.
    """
    graph = program.graph
    session = onnxruntime.InferenceSession(str(program.quantized), program.options, ["CPUExecutionProvider"])
    outputs: list[dict[str, Array]] = []
    compared = different = largest = same = 0
    for feeds in samples:
        found, _ = run_network(program.compiled, program.spec, feeds)
        outputs.append(found)
        wanted = session.run(list(graph.output_names), dict(feeds))
        for tensor, public, want in zip(graph.outputs, graph.output_names, map(np.asarray, wanted), strict=True):
            have = found[public].reshape(want.shape)
            apart = np.abs(have.astype(np.float64) - want)
            if tensor in graph.tensors:
                known = graph.tensors[tensor]
                apart = np.rint(apart / (known.scale if have.dtype.kind == "f" else 1))
            else:
                apart = (apart > 1e-5 * (1 + np.abs(want))).astype(np.float64)
            compared += apart.size
            different += int(np.count_nonzero(apart))
            largest = max(largest, int(apart.max(initial=0)))
            same += int(have.reshape(-1).argmax() == want.reshape(-1).argmax())
    ranked = len(graph.outputs) == 1 and np.asarray(wanted[0]).ndim == 2 if samples else False
    return Agreement(len(samples), compared, different, largest, same if ranked else None), outputs


def program_report(
    program: AsicProgram, baseline: Cost | None, agreement: Agreement | None, accuracy: float | None
) -> ProgramReport:
    """The program's part of a report."""
    cost, spec = program.cost, program.spec
    compiled = program.compiled
    cycles = program.host_cycles
    host = [HostCallRow(row.name, row.op, row.reason, cycles.get(row.name, 0.0)) for row in compiled.host_rows]
    predicted = compiled.predicted_cycles + sum(row.cycles for row in host)
    return ProgramReport(
        latency=Quantity(cost.latency, "cycles", cost.kind),
        time_s=cost.latency / (spec.clock_mhz * 1e6),
        energy=Quantity(cost.energy_pj, "pJ", cost.kind),
        dram_bytes=cost.dram_bytes,
        predicted_latency=Quantity(predicted, "cycles", cost.kind),
        baseline_latency=None if baseline is None else Quantity(baseline.latency, "cycles", baseline.kind),
        instructions=len(compiled.program.code),
        saved_dram_bytes=compiled.saved_bytes,
        utilization=program.result.utilization,
        calibrated=program.calibrated,
        agreement=agreement,
        accuracy=None if accuracy is None else Quantity(accuracy, "top-1", Kind.MEASURED),
        host=tuple(host),
        layout_changes=compiled.layout_changes,
        layers=tuple(
            ProgramLayer(
                layer.name,
                layer.op,
                layer.nodes,
                layer.cycles,
                layer.predicted_cycles if layer.predicted_cycles >= 0 else None,
                layer.utilization,
                layer.counts.dram_bytes,
                layer.energy_pj,
                layer.activities,
            )
            for layer in program.result.layers
        ),
    )
