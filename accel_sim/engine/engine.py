"""Runs a program: values and cycles together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.audit import Audit, Auditor
from accel_sim.engine.columnar import decode, members
from accel_sim.engine.counts import Counts, LayerRun, add_counts, layer_runs
from accel_sim.engine.effects import WORD_BYTES, Effect, Effects
from accel_sim.engine.errors import refuse
from accel_sim.engine.hazards import Happenings, check_change, happenings
from accel_sim.engine.layout import map_shape, pack_map, unpack_map
from accel_sim.engine.scratchpad import Box, Memory
from accel_sim.engine.timing import Schedule, schedule
from accel_sim.engine.trace import Timeline, chrome_trace, timeline
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Host, HostCall, Program, Queue, Tensor
from accel_sim.spec import MachineSpec

HostFunction = Callable[[HostCall, Mapping[str, NDArray[np.float32]]], Mapping[str, NDArray[np.float32]]]
"""Runs a host call on one sample: float tensors of the network's shapes, by name, to float tensors."""

_MOST_BYTES = 1 << 28
"""Samples run together as long as their memories take no more than this."""


@dataclass(frozen=True)
class Result:
    """``outputs``: the program's output tensors as bytes of the network's shapes, int8 or uint8; with the samples'
    axis in front where the inputs have one; empty without values. ``layers``: what each took, in order; ``counts``,
    ``energy_pj``, ``macs`` (useful) and ``host_cycles`` (an estimate, no part of ``cycles``) are sums over them.
    """

    program: Program
    spec: MachineSpec
    outputs: dict[str, NDArray[np.generic]]
    cycles: int
    layers: tuple[LayerRun, ...]
    counts: Counts
    energy_pj: float
    macs: int
    host_cycles: float
    schedule: Schedule
    audit: Audit | None = None

    @property
    def utilization(self) -> float:
        """Useful multiply-adds over what the array could have done in the time."""
        return self.macs / (self.cycles * self.spec.peak_macs_per_cycle) if self.cycles else 0.0

    @property
    def activities(self) -> dict[str, dict[str, int]]:
        """Cycles by queue and reason (:class:`accel_sim.engine.stalls.Activity`); each queue's sum to ``cycles``."""
        total: dict[str, dict[str, int]] = {queue.name.lower(): {} for queue in Queue}
        for layer in self.layers:
            for queue, reasons in layer.activities.items():
                for reason, cycles in reasons.items():
                    total[queue][reason] = total[queue].get(reason, 0) + cycles
        return total

    def chrome_trace(self) -> str:
        """See :func:`accel_sim.engine.trace.chrome_trace`."""
        return chrome_trace(self.program, self.schedule, self.layers, self.spec.clock_mhz)

    def timeline(self, bins: int = 400) -> Timeline:
        """See :func:`accel_sim.engine.trace.timeline`."""
        return timeline(self.program, self.schedule, self.layers, bins)


def run(
    program: Program,
    spec: MachineSpec,
    inputs: Mapping[str, NDArray[np.generic]],
    *,
    values: bool = True,
    hazards: bool = True,
    host: HostFunction | None = None,
    audit: bool = False,
) -> Result:
    """Runs ``program`` on ``spec``.

    ``inputs``: per input tensor its bytes, int8 or uint8, of the network's shape, or with an axis of samples in front:
    independent runs of the same program. ``values`` False: cycles alone, and no inputs. ``hazards``: see
    :mod:`accel_sim.engine.hazards`, and reads of what was never written. ``host``: what runs the host calls.
    ``audit``: the result says what was loaded in vain and written twice (:class:`accel_sim.engine.audit.Audit`).

    ProgramError for a program that cannot run, DeadlockError, HazardError: all with the instruction's index.
    ValueError for inputs of another name, shape or type.
    """
    columns = decode(program, spec)
    times = schedule(program, spec, columns)
    outputs: dict[str, NDArray[np.generic]] = {}
    audited: Audit | None = None
    if values:
        _check_widths(spec)
        given, samples = _samples(program, inputs)
        if program.calls and host is None and any(isinstance(program.code[at], Host) for at in columns.barriers):
            raise ValueError("the program calls the host: values need a host function")
        order = happenings(times)
        memory = program.dram_bytes + 1024 * _scratchpad_kib(spec) + 1024 * spec.scratchpads.accumulator_kib
        together = max(1, min(samples or 1, _MOST_BYTES // max(memory, 1)))
        parts = []
        for begin in range(0, samples or 1, together):
            part = {name: data[begin : begin + together] for name, data in given.items()}
            count = min(together, (samples or 1) - begin)
            one = _Run(program, spec, times, order, part, count, hazards, host, audit and begin == 0)
            parts.append(one.outputs())
            audited = audited or one.audit()
        for name in parts[0]:
            joined = np.concatenate([part[name] for part in parts])
            outputs[name] = joined[0] if samples is None else joined
    layers = layer_runs(program, spec, times)
    return Result(
        program,
        spec,
        outputs,
        times.cycles,
        layers,
        add_counts(layer.counts for layer in layers),
        sum(layer.energy_pj for layer in layers),
        sum(layer.macs for layer in layers),
        sum(layer.host_cycles for layer in layers),
        times,
        audited,
    )


def _scratchpad_kib(spec: MachineSpec) -> int:
    return spec.scratchpads.input_kib + spec.scratchpads.weight_kib


def _check_widths(spec: MachineSpec) -> None:
    if spec.datatypes.data_bits != 8 or spec.datatypes.accumulator_bytes != WORD_BYTES:
        raise ValueError(f"{spec.name}: values are computed for 8-bit data and 32-bit accumulators only")


def _samples(
    program: Program, inputs: Mapping[str, NDArray[np.generic]]
) -> tuple[dict[str, NDArray[np.generic]], int | None]:
    """The inputs with an axis of samples, and how many those are; None where the inputs have no such axis."""
    wanted = {tensor.name: tensor for tensor in program.tensors if tensor.role == "input"}
    if set(inputs) != set(wanted):
        raise ValueError(f"inputs {sorted(inputs)} given, {sorted(wanted)} expected")
    counts: set[int | None] = set()
    given: dict[str, NDArray[np.generic]] = {}
    for name, tensor in wanted.items():
        data = np.asarray(inputs[name])
        dtype = np.dtype(np.int8 if tensor.signed else np.uint8)
        if data.dtype != dtype or data.shape[data.ndim - len(tensor.shape) :] != tensor.shape:
            raise ValueError(f"input {name}: {data.dtype} of shape {data.shape}, expected {dtype} of {tensor.shape}")
        if data.ndim - len(tensor.shape) not in (0, 1):
            raise ValueError(
                f"input {name} of shape {data.shape} has more than an axis of samples before {tensor.shape}"
            )
        counts.add(len(data) if data.ndim > len(tensor.shape) else None)
        given[name] = data.reshape(-1, *tensor.shape)
    if len(counts) > 1 or counts == {0}:
        raise ValueError("all inputs must have the same number of samples, at least one")
    return given, counts.pop() if counts else None


class _Run:
    """The memories, and the effects of all instructions upon them."""

    def __init__(
        self,
        program: Program,
        spec: MachineSpec,
        times: Schedule,
        order: Happenings,
        inputs: Mapping[str, NDArray[np.generic]],
        samples: int,
        hazards: bool,
        host: HostFunction | None,
        audit: bool,
    ) -> None:
        self.program = program
        self.times = times
        self.order = order
        self.samples = samples
        self.hazards = hazards
        self.host = host
        self.dram = Memory("DRAM", program.dram_bytes, samples)
        self.effects = Effects(
            program,
            self.dram,
            Memory("scratchpad", 1024 * _scratchpad_kib(spec), samples),
            Memory("accumulator memory", 1024 * spec.scratchpads.accumulator_kib, samples),
        )
        end = program.constants_address + len(program.constants)
        if program.constants_address < 0 or end > program.dram_bytes:
            raise ProgramError("the constants reach beyond the DRAM", "constants")
        self.dram.data[:, program.constants_address : end] = np.frombuffer(program.constants, np.uint8)
        self.dram.written[program.constants_address : end] = True
        for tensor in program.tensors:
            if tensor.role == "input":
                self._put(tensor, pack_map(inputs[tensor.name], tensor.shape, program.columns))
        on_chip = (self.effects.scratchpad, self.effects.accumulators)
        self._auditor = Auditor(program, on_chip) if audit else None
        self._near: dict[int, list[Effect]] = {}
        self._members = [members(times.columns, queue) for queue in Queue]
        self._run()

    def _run(self) -> None:
        order = self.order
        barriers = self.times.columns.barriers
        segment = 0
        for place in range(len(order.queue)):
            while segment < order.segment[place]:
                self._barrier(int(barriers[segment]))
                segment += 1
            self._happen(place)
        for at in barriers[segment:]:
            self._barrier(int(at))

    def _effects_at(self, place: int) -> list[Effect]:
        """The effects of the item at a place of the order; kept as long as others may overlap it."""
        if place not in self._near:
            members = self._members[self.order.queue[place]][self.order.item[place]]
            self._near[place] = [effect for index in members if (effect := self.effects.of(index)) is not None]
        return self._near[place]

    def _happen(self, place: int) -> None:
        beside = self.order.beside(place) if self.hazards else []
        others = [effect for other in beside for effect in self._effects_at(other)]
        for effect in self._effects_at(place):
            if self.hazards:
                for box in effect.reads:
                    box.need_written(effect.index)
            values = effect.compute()
            if others:
                check_change(effect, values, others)
            if self._auditor is not None:
                self._auditor.effect(effect)
            write = effect.write
            write.values()[...] = values
            write.mark(write.memory.varies, any(box.some_vary() for box in effect.reads))
            write.mark(write.memory.written, True)
        if len(self._near) > 64:
            oldest = min([place, *beside])
            self._near = {at: found for at, found in self._near.items() if at >= oldest}

    def _barrier(self, index: int) -> None:
        instruction = self.program.code[index]
        if not isinstance(instruction, Host):
            return
        if not 0 <= instruction.call < len(self.program.calls):
            raise refuse(index, f"host call {instruction.call} does not exist")
        assert self.host is not None
        call = self.program.calls[instruction.call]
        tensors = {tensor.name: tensor for tensor in self.program.tensors}
        missing = [name for name in (*call.inputs, *call.outputs) if name not in tensors]
        if missing:
            raise refuse(index, f"the host's tensor {missing[0]} does not exist")
        inputs = {name: self._get(tensors[name], index) for name in call.inputs}
        results: dict[str, list[NDArray[np.float32]]] = {name: [] for name in call.outputs}
        for sample in range(self.samples):
            floats = {}
            for name, data in inputs.items():
                tensor = tensors[name]
                centred = data[sample].astype(np.float32) - np.float32(tensor.zero_point)
                floats[name] = np.asarray(centred * np.float32(tensor.scale), np.float32)
            answer = self.host(call, floats)
            for name in call.outputs:
                found, wanted = np.asarray(answer[name], np.float32), tensors[name].shape
                if found.size != prod(wanted):
                    raise refuse(index, f"the host gives {found.shape} for {name!r}, a tensor of {wanted}")
                results[name].append(found.reshape(wanted))
        for name, made in results.items():
            tensor = tensors[name]
            low, high = (-128, 127) if tensor.signed else (0, 255)
            real = np.rint(np.stack(made) / np.float32(tensor.scale))
            integers = np.clip(real, low - tensor.zero_point, high - tensor.zero_point).astype(np.int16)
            bytes_ = (integers + np.int16(tensor.zero_point)).astype(np.int8 if tensor.signed else np.uint8)
            self._put(tensor, pack_map(bytes_, tensor.shape, self.program.columns))
            if self._auditor is not None:
                self._auditor.host(self._box(tensor))

    def _box(self, tensor: Tensor) -> Box:
        images, channels, positions = map_shape(tensor.shape)
        box = Box(self.dram, tensor.address, (images * channels * positions,))
        low, high = box.span
        if low < 0 or high > self.dram.size:
            raise ProgramError(f"{tensor.name} reaches beyond the DRAM", "tensors", self.program.tensors.index(tensor))
        return box

    def _put(self, tensor: Tensor, data: NDArray[np.uint8]) -> None:
        box = self._box(tensor)
        box.values()[...] = data
        box.mark(self.dram.written, True)
        box.mark(self.dram.varies, True)

    def _get(self, tensor: Tensor, index: int) -> NDArray[np.generic]:
        """A tensor's bytes in the network's layout; HazardError of ``index`` where they were never written."""
        box = self._box(tensor)
        if self.hazards:
            box.need_written(index)
        return unpack_map(box.values(), tensor.shape, self.program.columns, tensor.signed)

    def audit(self) -> Audit | None:
        return None if self._auditor is None else self._auditor.result()

    def outputs(self) -> dict[str, NDArray[np.generic]]:
        """The output tensors, with the samples' axis."""
        halt = len(self.program.code) - 1
        return {tensor.name: self._get(tensor, halt) for tensor in self.program.tensors if tensor.role == "output"}
