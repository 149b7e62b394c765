"""What a run costs by layer: cycles, bytes per memory level, energy, utilisation, bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import prod

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.columnar import COUNTERS
from accel_sim.engine.items import BARRIER
from accel_sim.engine.stalls import Activity, queue_activities
from accel_sim.engine.timing import Schedule
from accel_sim.pricing.machine import RATE, machine_record
from accel_sim.program.isa import Host, Program, Queue, Sync
from accel_sim.spec import MachineSpec


@dataclass(frozen=True)
class Counts:
    """Events, as the price list counts them (docs/engine.md). DRAM bytes are whole bursts.

    ``array_macs`` are those of the tiles, zero weights of the mapping included.
    """

    array_macs: int = 0
    vector_operations: int = 0
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0
    scratchpad_read_bytes: int = 0
    scratchpad_write_bytes: int = 0
    accumulator_read_bytes: int = 0
    accumulator_write_bytes: int = 0

    @property
    def dram_bytes(self) -> int:
        return self.dram_read_bytes + self.dram_write_bytes

    def energy_pj(self, spec: MachineSpec, cycles: int, macs: int) -> float:
        """Energy by the machine's table; ``macs`` are the useful ones: what holds a zero weight is gated."""
        table = spec.energy
        return (
            macs * table.mac_pj
            + self.vector_operations * table.vector_operation_pj
            + self.scratchpad_read_bytes * table.scratchpad_read_pj_per_byte
            + self.scratchpad_write_bytes * table.scratchpad_write_pj_per_byte
            + self.accumulator_read_bytes * table.accumulator_read_pj_per_byte
            + self.accumulator_write_bytes * table.accumulator_write_pj_per_byte
            + self.dram_bytes * table.dram_pj_per_byte
            + cycles * table.static_pj_per_cycle
        )


def add_counts(counts: Iterable[Counts]) -> Counts:
    """The sums."""
    every = list(counts)
    return Counts(*(sum(getattr(one, field.name) for one in every) for field in fields(Counts)))


assert tuple(field.name for field in fields(Counts)) == COUNTERS


@dataclass(frozen=True)
class LayerRun:
    """What one layer, from its Sync to the next, took.

    ``marker``: index of the program's marker, -1 before the first Sync. ``begin``: its first cycle. ``macs``: the
    useful ones. ``array_cycles``, ``vector_cycles``, ``channel_cycles``: the unit is busy (the channel with data).
    ``activities``: cycles by queue and reason, each queue's summing to ``cycles``. ``utilization``: useful
    multiply-adds over what the array could do in the time. ``host_calls`` and ``host_cycles``: the host's, an
    estimate, and no part of ``cycles``. ``compute_bound_cycles`` and ``bandwidth_bound_cycles``: the roofline.
    """

    marker: int
    name: str
    op: str
    nodes: tuple[str, ...]
    begin: int
    cycles: int
    predicted_cycles: int
    macs: int
    array_cycles: int
    vector_cycles: int
    channel_cycles: int
    activities: dict[str, dict[str, int]]
    counts: Counts
    energy_pj: float
    utilization: float
    host_calls: tuple[int, ...]
    host_cycles: float
    compute_bound_cycles: float
    bandwidth_bound_cycles: float


def layer_runs(program: Program, spec: MachineSpec, times: Schedule) -> tuple[LayerRun, ...]:
    """The layers of a run, in order; a marker that begins twice is listed twice."""
    columns = times.columns
    segments = len(columns.barriers)
    activities = queue_activities(times)
    counters = _by_segment(columns.counters, columns.segment, segments)
    units = np.zeros((segments, 3), np.int64)
    execute = columns.items[Queue.EXECUTE]
    vector = columns.counters[execute.first, 1] > 0
    np.add.at(units[:, 0], execute.segment[~vector], execute.cycles[~vector])
    np.add.at(units[:, 1], execute.segment[vector], execute.cycles[vector])
    for part in (columns.items[Queue.LOAD], columns.items[Queue.STORE]):
        np.add.at(units[:, 2], part.segment[~part.local], part.cycles[~part.local])

    found: list[LayerRun] = []
    marker, first, calls = -1, 0, list[int]()
    for segment in range(segments):
        barrier = program.code[int(columns.barriers[segment])]
        if isinstance(barrier, Host):
            calls.append(barrier.call)
            continue
        begin = int(times.barriers[first - 1]) if first else 0
        cycles = int(times.barriers[segment]) - begin
        if marker >= 0 or cycles or calls or (columns.segment[columns.queue != BARRIER] <= segment).any():
            found.append(
                _layer(
                    program,
                    spec,
                    marker,
                    (begin, cycles),
                    Counts(*counters[first : segment + 1].sum(axis=0).tolist()),
                    units[first : segment + 1].sum(axis=0).tolist(),
                    activities[first : segment + 1].sum(axis=0),
                    tuple(calls),
                )
            )
        if isinstance(barrier, Sync):
            marker = barrier.marker
        first, calls = segment + 1, []
    return tuple(found)


def _by_segment(values: NDArray[np.int64], segment: NDArray[np.int64], segments: int) -> NDArray[np.int64]:
    sums = np.zeros((segments, values.shape[1]), np.int64)
    starts = np.flatnonzero(np.diff(segment, prepend=-1))
    sums[segment[starts]] = np.add.reduceat(values, starts, axis=0)
    return sums


def _layer(
    program: Program,
    spec: MachineSpec,
    marker: int,
    span: tuple[int, int],
    counts: Counts,
    units: list[int],
    activities: NDArray[np.int64],
    calls: tuple[int, ...],
) -> LayerRun:
    begin, cycles = span
    known = program.markers[marker] if 0 <= marker < len(program.markers) else None
    macs = known.macs if known is not None and known.macs and counts.array_macs else counts.array_macs
    sizes = {tensor.name: prod(tensor.shape) for tensor in program.tensors}
    host_cycles = 0.0
    for call in calls:
        chosen = program.calls[call]
        touched = sum(sizes[name] for name in (*chosen.inputs, *chosen.outputs))
        host_cycles += spec.host.call_cycles + touched * spec.host.element_cycles
    if calls and known is not None and not counts.array_macs:
        host_cycles += known.macs * spec.host.mac_cycles
    peak = spec.peak_macs_per_cycle
    rate = int(machine_record(spec)[0]["rate"]) / RATE
    return LayerRun(
        marker=marker,
        name=known.name if known is not None else "",
        op=known.op if known is not None else "",
        nodes=known.nodes if known is not None else (),
        begin=begin,
        cycles=cycles,
        predicted_cycles=known.predicted_cycles if known is not None else -1,
        macs=macs,
        array_cycles=units[0],
        vector_cycles=units[1],
        channel_cycles=units[2],
        activities={
            queue.name.lower(): {
                kind.name.lower(): int(activities[queue, kind]) for kind in Activity if activities[queue, kind]
            }
            for queue in Queue
        },
        counts=counts,
        energy_pj=counts.energy_pj(spec, cycles, macs),
        utilization=macs / (cycles * peak) if cycles else 0.0,
        host_calls=calls,
        host_cycles=host_cycles,
        compute_bound_cycles=counts.array_macs / peak + counts.vector_operations / spec.vector.lanes,
        bandwidth_bound_cycles=counts.dram_bytes / rate,
    )
