"""What is deployed on an accelerator: the quantized network, its program, and a library that carries the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.container import encode, write_program
from accel_sim.program.listing import write_listing
from accel_sim.spec import MachineSpec
from codegen import tvm_build
from codegen.asic_binary.build import build, compiler
from codegen.asic_binary.check import run_library, simulator
from codegen.asic_binary.segments import Cut, cut
from codegen.asic_compile.compile import compile_graph
from codegen.asic_latency import AsicLatency
from codegen.asic_program import AsicProgram, baseline_cycles, compare, make_program, program_report
from codegen.child_process import Child
from codegen.emission import LIBRARY, Emission, EmissionRequest, emit_host_library
from codegen.events import Events, RecordingEvents
from codegen.quantized.graph import QuantizedGraph
from codegen.quantized.onnx_network import integer_options
from codegen.report.build import BinaryCheck
from codegen.tvm_build import NoBinary
from codegen.tvm_check import difference
from codegen.verification import top1
from passes.core.cost import Cost
from passes.errors import InputError, UnsupportedError, VerificationError

HOST_LIBRARY = "model_host.so"
QUANTIZED = "model_int8.onnx"
PROGRAM, LISTING, TRACE = "program.bin", "program.lst", "trace.json"

_CHECKED_SAMPLES = 2
"""Single inferences on the engine with values and hazards; the library repeats them."""

_RANGE_SAMPLES = 256
"""Samples that the ranges of int8 are taken from: more change them little."""

_TRACED_INSTRUCTIONS = 50_000
"""A trace of more is no picture that a browser opens."""


class _Processes(ExitStack):
    """What one emission runs apart from itself, started one by one, or at the latest when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._children: list[Child] = []

    def start_one(self) -> bool:
        """Starts one more; False where all of them run."""
        makers = (tvm_build.compiler, compiler, simulator)
        if len(self._children) == len(makers):
            return False
        self._children.append(self.enter_context(makers[len(self._children)]()))
        return True

    def all_three(self) -> tuple[Child, Child, Child]:
        """Those that compile for the host and for the machine, and the one that simulates the machine."""
        while self.start_one():
            pass
        host_compiler, library_compiler, simulated = self._children
        return host_compiler, library_compiler, simulated


@dataclass(frozen=True, eq=False)
class AsicEmitter:
    """Emits for ``spec``; ``machine`` and ``options`` are how :func:`accel_sim.spec_file.load_spec` finds it again."""

    spec: MachineSpec
    machine: str
    options: Mapping[str, str]
    prices: AsicLatency
    _started: list[_Processes] = field(default_factory=list, init=False, repr=False)

    def get_ready(self) -> bool:
        """Starts one more process of the next emission: it imports what it needs while other work goes on."""
        if not self._started:
            self._started.append(_Processes())
        return self._started[0].start_one()

    def close(self) -> None:
        """Ends what was started and not used."""
        while self._started:
            self._started.pop().close()

    def __call__(self, request: EmissionRequest) -> Emission:
        """Writes program.bin, its listing and trace, model_int8.onnx, model.so and model_host.so, as far as there are.

        A machine or a network without a program keeps model.onnx and model_host.so; a warning says why.
        """
        if request.draft:
            return self._for_the_machine(request)
        with (
            self._started.pop() if self._started else _Processes() as processes,
            ThreadPoolExecutor(1) as beside,  # it waits for another process most of the time
        ):
            apart = RecordingEvents()
            own = replace(request, events=apart)
            host_compiler, *for_the_machine = processes.all_three()
            waiting = beside.submit(emit_host_library, own, HOST_LIBRARY, host_compiler)
            emission = self._for_the_machine(request, *for_the_machine)
            with request.events.stage("compile for the host"):
                host = waiting.result()
        for text in apart.warnings:
            request.events.warning(text)
        if host.check is not None:
            found = host.check
            request.events.note(
                f"{HOST_LIBRARY}, run in a fresh process against model.onnx in onnxruntime: relative error "
                f"{found.relative_l2:.2g}, largest difference {found.max_abs:.2g} over {found.samples} samples"
            )
        artifacts = emission.artifacts | {"host_binary": host.artifacts["binary"]}
        return replace(emission, artifacts=artifacts, check=emission.check or host.check)

    def _for_the_machine(
        self, request: EmissionRequest, library_compiler: Child | None = None, simulated: Child | None = None
    ) -> Emission:
        """All but the library for the host alone; what builds and runs the other one, where it is no draft."""
        artifacts: dict[str, str | None] = {"binary": None, "program": None}
        try:
            program = self._program(request)
        except (UnsupportedError, InputError) as error:
            if not request.draft:
                request.events.warning(f"no {PROGRAM}: {error}")
            if (request.folder / QUANTIZED).is_file():
                artifacts["quantized"] = QUANTIZED
            return Emission(artifacts)
        if request.draft:
            return Emission({"quantized": QUANTIZED}, cost=program.cost)
        folder = request.folder
        compiled = program.compiled.program
        write_program(compiled, folder / PROGRAM)
        write_listing(compiled, folder / LISTING, self.spec, data=False)
        artifacts |= {"program": PROGRAM, "listing": LISTING}
        if program.quantized.parent == folder and program.quantized.name == QUANTIZED:
            artifacts["quantized"] = QUANTIZED
        if len(compiled.code) <= _TRACED_INSTRUCTIONS:
            (folder / TRACE).write_text(program.result.chrome_trace(), encoding="utf-8")
            artifacts["trace"] = TRACE
        samples = _bound(program.graph, request.samples)[:_CHECKED_SAMPLES]
        with request.events.stage("check the program"):
            agreement, outputs = compare(program, samples)
        check = self._library(request, program, samples, outputs, library_compiler, simulated)
        if check is not None:
            artifacts["binary"] = LIBRARY
        report = program_report(program, request.baseline, agreement, _accuracy(request, program))
        return Emission(artifacts, check, program.cost, report)

    def _program(self, request: EmissionRequest) -> AsicProgram:
        calibration = request.calibration.head(_RANGE_SAMPLES) if request.calibrated else None
        return make_program(
            request.model,
            request.folder / QUANTIZED,
            self.spec,
            self.prices,
            calibration,
            request.shapes,
            request.seed,
            request.events,
        )

    def baseline(self, model: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, events: Events) -> Cost | None:
        """What the program of the network at ``model`` costs; None, and a note, where it has none."""
        try:
            return baseline_cycles(model, self.spec, self.prices, shapes, seed, events)
        except (UnsupportedError, InputError) as error:
            events.note(f"the network as it came has no program: {error}")
            return None

    def _library(
        self,
        request: EmissionRequest,
        program: AsicProgram,
        samples: Sequence[Mapping[str, NDArray[Any]]],
        outputs: Sequence[Mapping[str, NDArray[Any]]],
        library_compiler: Child | None,
        simulated: Child | None,
    ) -> BinaryCheck | None:
        """Builds model.so and holds it to the engine's own outputs and cycles; None, and a warning, without one."""
        events = request.events
        with events.stage("compile the library"):
            parts = cut(program.graph)
            programs = [program.compiled.program] if _is_whole(parts) else [
                compile_graph(segment.graph, self.spec, self.prices).program for segment in parts.segments
            ]  # fmt: skip
            binary = build(parts, [encode(p) for p in programs], request.folder / LIBRARY, child=library_compiler)
        if isinstance(binary, NoBinary):
            events.warning(f"no {LIBRARY}: {binary.reason}")
            return None
        wanted = [[found[name] for name in program.graph.output_names] for found in outputs]
        with events.stage("check the library"):
            try:
                made, cycles = run_library(binary, self.machine, self.options, samples, child=simulated)
                found = difference(made, wanted)
                if not found.within(1e-6, 1e-6):
                    raise VerificationError(
                        f"{LIBRARY} differs from its program on the engine by {found.relative_l2:.2g} (relative L2)"
                    )
                if any(count != program.result.cycles for count in cycles):
                    raise VerificationError(f"{LIBRARY} took {cycles[0]} cycles, its program {program.result.cycles}")
            except VerificationError as error:
                binary.library.unlink(missing_ok=True)
                events.warning(f"no {LIBRARY}: {error}")
                return None
        return BinaryCheck(found.relative_l2, found.max_abs, found.samples, dict(binary.bound))


def _is_whole(parts: Cut) -> bool:
    return len(parts.parts) == 1


def _bound(graph: QuantizedGraph, samples: Sequence[Mapping[str, NDArray[Any]]]) -> list[Mapping[str, NDArray[Any]]]:
    """The samples that have the shapes that the program was made for."""
    shapes = {
        public: (graph.tensors[name] if name in graph.tensors else graph.host_tensors[name]).shape
        for public, name in zip(graph.input_names, graph.inputs, strict=True)
    }
    return [feeds for feeds in samples if all(np.shape(feeds[name]) == shape for name, shape in shapes.items())]


def _accuracy(request: EmissionRequest, program: AsicProgram) -> float | None:
    """Top-1 of the quantized network in onnxruntime, where there are labels."""
    data = request.evaluation
    if data is None or data.labels is None:
        return None
    with request.events.stage("evaluate the quantized network"):
        options = integer_options(program.graph.signed, threads=0)
        return top1(Path(program.quantized), data, options=options)
