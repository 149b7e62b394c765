"""A program as columns: what its timing and its counters need to know of each instruction."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.dma import RUN, moved_bytes
from accel_sim.engine.errors import refuse
from accel_sim.engine.items import BARRIER, MAY_POST, MAY_WAIT, Items, check_balance, items_of
from accel_sim.pricing.array import (
    gemm_accumulator_writes,
    gemm_cycles,
    gemm_input_reads,
    gemm_weight_reads,
)
from accel_sim.pricing.machine import machine_record
from accel_sim.program.isa import (
    Dataflow,
    Halt,
    Load,
    Matmul,
    Preload,
    Program,
    Queue,
    Space,
    Store,
    Token,
    Vector,
    VectorFunction,
)
from accel_sim.spec import MachineSpec

DATAFLOW_NAMES = {
    Dataflow.WEIGHT_STATIONARY: "ws",
    Dataflow.OUTPUT_STATIONARY: "os",
    Dataflow.INPUT_STATIONARY: "is",
}

COUNTERS = (
    "array_macs",
    "vector_operations",
    "dram_read_bytes",
    "dram_write_bytes",
    "scratchpad_read_bytes",
    "scratchpad_write_bytes",
    "accumulator_read_bytes",
    "accumulator_write_bytes",
)
"""What is counted, the columns of :attr:`Columns.counters`: see docs/engine.md."""
_MOST_BYTES = 1 << 40
"""More than any transfer moves; so that no sum of them is beyond an int64."""

MACS, OPERATIONS, DRAM_READ, DRAM_WRITE, PAD_READ, PAD_WRITE, SUM_READ, SUM_WRITE = range(8)


@dataclass(frozen=True)
class Columns:
    """``queue`` to ``counters`` have one entry per instruction.

    ``segment``: how many barriers stand before. ``cycles`` are those of the array, the vector unit or the way into the
    scratchpad; the channel's are counted by the request (:class:`Items`). ``payload_bytes`` cross between DRAM and
    chip, in ``moved_bytes`` of whole bursts. ``preloads``: which are a Preload. ``counters``: (instructions,
    len(:data:`COUNTERS`)). ``barriers``: the index of each barrier instruction; the last one is the Halt. ``items``:
    those of the load, execute and store queue.
    """

    queue: NDArray[np.int8]
    segment: NDArray[np.int64]
    cycles: NDArray[np.int64]
    payload_bytes: NDArray[np.int64]
    moved_bytes: NDArray[np.int64]
    preloads: NDArray[np.bool_]
    counters: NDArray[np.int64]
    barriers: NDArray[np.int64]
    items: tuple[Items, Items, Items]


def decode(program: Program, spec: MachineSpec) -> Columns:
    """The columns of ``program`` on ``spec``.

    ProgramError, with the instruction's index, for what no machine can begin: a descriptor that does not exist, a
    chain without a head, a preload without its Matmul, a dataflow that the array has not, tokens of another queue's,
    tokens left over at a barrier, a program that does not end with one Halt.
    """
    code = program.code
    if not code or not isinstance(code[-1], Halt):
        raise refuse(max(len(code) - 1, 0), "the last instruction of a program is a Halt")
    decoder = _Decoder(program, spec)
    for index, instruction in enumerate(code):
        if isinstance(instruction, Load):
            decoder.load(index, instruction)
        elif isinstance(instruction, Store):
            decoder.store(index, instruction)
        elif isinstance(instruction, Matmul):
            decoder.matmul(index, instruction)
        elif isinstance(instruction, Preload | Vector):
            decoder.preload_or_vector(index, instruction)
        else:
            decoder.barrier(index)
    return decoder.columns()


class _Decoder:
    def __init__(self, program: Program, spec: MachineSpec) -> None:
        count = len(program.code)
        self.program = program
        self.spec = spec
        self.machine = machine_record(spec)[0]
        self.queue = np.full(count, BARRIER, np.int8)
        self.rows = np.zeros((count, 4), np.int64)  # wait, post, chained, into the scratchpad
        self.cycles = np.zeros(count, np.int64)
        self.preloads = np.zeros(count, np.bool_)
        self.counters = np.zeros((count, len(COUNTERS)), np.int64)
        self.transfers: list[tuple[int, ...]] = []
        self.transfer_at: list[int] = []
        self.gemms: dict[tuple[int, int, int, int], tuple[int, ...]] = {}
        self.open_preload = -1

    def load(self, index: int, load: Load) -> None:
        loops = load.loops
        self.queue[index] = Queue.LOAD
        self.transfers.append((load.dram_address, loops.run, *loops.counts, *loops.dram_strides))
        self.transfer_at.append(index)
        self.rows[index] = (load.wait, load.post, load.chained, 0)
        if load.space == Space.ACCUMULATOR:
            self.counters[index, SUM_WRITE] = loops.run * prod(loops.counts) * self.spec.datatypes.data_bytes
        else:
            self.counters[index, PAD_WRITE] = -1  # all that moves

    def store(self, index: int, store: Store) -> None:
        loops = store.loops
        elements = loops.run * prod(loops.counts)
        self.queue[index] = Queue.STORE
        self.rows[index] = (store.wait, store.post, store.chained, store.to_scratchpad)
        if store.lanes < 1 or loops.run % store.lanes:
            raise refuse(index, f"a run of {loops.run} is no multiple of its {store.lanes} lanes")
        if store.to_scratchpad:
            if store.lanes > self.spec.array.columns:
                raise refuse(index, f"{store.lanes} lanes leave an array of {self.spec.array.columns} columns")
            self.cycles[index] = elements // store.lanes
            self.counters[index, PAD_WRITE] = elements * self.spec.datatypes.data_bytes
        else:
            self.transfers.append((store.address, loops.run, *loops.counts, *loops.dram_strides))
            self.transfer_at.append(index)
        width = self.spec.datatypes.accumulator_bytes if store.output >= 0 else 1
        residual = 0 if store.residual_address < 0 else self.spec.datatypes.data_bytes
        self.counters[index, SUM_READ] = elements * (width + residual)

    def matmul(self, index: int, matmul: Matmul) -> None:
        self.queue[index] = Queue.EXECUTE
        self.rows[index, :2] = (matmul.wait, matmul.post)
        if not 0 <= matmul.window < len(self.program.windows):
            raise refuse(index, f"window {matmul.window} does not exist")
        window = self.program.windows[matmul.window]
        m = window.images * prod(window.out)
        gemm = (int(matmul.dataflow), m, prod(window.kernel) * matmul.channels, matmul.filters)
        if gemm not in self.gemms:
            if min(gemm[1:]) < 1:
                raise refuse(index, "a product of {} x {} x {} is none".format(*gemm[1:]))
            if DATAFLOW_NAMES[Dataflow(matmul.dataflow)] not in self.spec.array.dataflows:
                raise refuse(index, f"{self.spec.name} has no {Dataflow(matmul.dataflow).name.lower()} dataflow")
            self.gemms[gemm] = self._gemm(*gemm)
        self.cycles[index], *counters = self.gemms[gemm]
        if self.open_preload >= 0:
            if matmul.dataflow == Dataflow.OUTPUT_STATIONARY:
                raise refuse(self.open_preload, "an output-stationary product has nothing to preload")
            self.cycles[index] -= self.spec.array.rows
            self.open_preload = -1
        self.counters[index] = counters
        if matmul.accumulate:
            self.counters[index, SUM_READ] += m * matmul.filters * self.spec.datatypes.accumulator_bytes

    def _gemm(self, dataflow: int, m: int, k: int, n: int) -> tuple[int, ...]:
        """Cycles and counters of a product whose first partial sums are added to nothing."""
        rows, columns = self.spec.array.rows, self.spec.array.columns
        widths = self.spec.datatypes
        shape = (dataflow, rows, columns, m, k, n)
        reads = gemm_input_reads(*shape) + gemm_weight_reads(*shape)
        sums = gemm_accumulator_writes(*shape)
        counters = [0] * len(COUNTERS)
        counters[MACS] = m * k * n
        counters[PAD_READ] = reads * widths.data_bytes
        counters[SUM_WRITE] = sums * widths.accumulator_bytes
        counters[SUM_READ] = (sums - m * n) * widths.accumulator_bytes
        return (gemm_cycles(self.machine, dataflow, m, k, n), *counters)

    def preload_or_vector(self, index: int, instruction: Preload | Vector) -> None:
        self._close_preload()
        self.queue[index] = Queue.EXECUTE
        self.rows[index, :2] = (instruction.wait, instruction.post)
        if isinstance(instruction, Preload):
            self.cycles[index] = self.spec.array.rows
            self.preloads[index] = True
            self.open_preload = index
            return
        if instruction.operations < 0 or instruction.elements < 0:
            raise refuse(index, "a vector instruction counts less than nothing")
        if not 0 <= instruction.spec < len(self.program.vectors):
            raise refuse(index, f"vector specification {instruction.spec} does not exist")
        spec = self.program.vectors[instruction.spec]
        read = instruction.elements * (1 if instruction.b_address < 0 else 2)
        if spec.function == VectorFunction.FILL:
            read = 0
        elif spec.function in (VectorFunction.MAX_POOL, VectorFunction.AVERAGE_POOL):
            if not 0 <= spec.window < len(self.program.windows):
                raise refuse(index, f"window {spec.window} does not exist")
            window = self.program.windows[spec.window]
            read = window.images * window.channels * prod(window.extent)
        self.cycles[index] = -(-instruction.operations // self.spec.vector.lanes)
        self.counters[index, [OPERATIONS, PAD_READ, SUM_WRITE]] = (instruction.operations, read, instruction.elements)

    def barrier(self, index: int) -> None:
        self._close_preload()
        if index < len(self.program.code) - 1 and isinstance(self.program.code[index], Halt):
            raise refuse(index, "a Halt that is not the last instruction")

    def _close_preload(self) -> None:
        if self.open_preload >= 0:
            raise refuse(self.open_preload, "a preload is followed by the Matmul that it belongs to")

    def columns(self) -> Columns:
        queue, rows = self.queue, self.rows
        for at, masks, verb in ((0, MAY_WAIT, "waits for"), (1, MAY_POST, "posts")):
            wrong = np.flatnonzero(rows[:, at] & ~np.array(masks, np.int64)[queue])
            if len(wrong):
                raise refuse(int(wrong[0]), f"its queue never {verb} {Token(int(rows[wrong[0], at]))!r}")
        payload, moved = self._channel_bytes()
        self.counters[queue == Queue.LOAD, DRAM_READ] = moved[queue == Queue.LOAD]
        self.counters[queue == Queue.STORE, DRAM_WRITE] = moved[queue == Queue.STORE]
        into_pad = self.counters[:, PAD_WRITE] < 0
        self.counters[into_pad, PAD_WRITE] = moved[into_pad]

        barriers = np.flatnonzero(queue == BARRIER)
        segment = np.cumsum(queue == BARRIER) - (queue == BARRIER)
        load, execute, store = (
            items_of(at, queue, rows, segment, self.cycles, moved, int(self.machine["rate"]))
            for at in (Queue.LOAD, Queue.EXECUTE, Queue.STORE)
        )
        items: tuple[Items, Items, Items] = (load, execute, store)
        check_balance(items, barriers)
        return Columns(queue, segment, self.cycles, payload, moved, self.preloads, self.counters, barriers, items)

    def _channel_bytes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of each instruction that cross the channel, and those that move for them."""
        payload, moved = np.zeros(len(self.queue), np.int64), np.zeros(len(self.queue), np.int64)
        if self.transfers:
            transfers, at = np.array(self.transfers, np.int64), np.array(self.transfer_at)
            counts = transfers[:, RUN : RUN + 4]
            wrong = np.flatnonzero((counts < 0).any(axis=1) | (counts.astype(np.float64).prod(axis=1) > _MOST_BYTES))
            if len(wrong):
                raise refuse(int(at[wrong[0]]), f"a transfer of {counts[wrong[0]].tolist()} bytes")
            payload[at] = counts.prod(axis=1)
            for queue in (Queue.LOAD, Queue.STORE):
                own = self.queue[at] == queue
                chained = self.rows[at[own], 2]
                moved[at[own]] = moved_bytes(transfers[own], chained, int(self.machine["burst"]))
        return payload, moved


def members(columns: Columns, queue: Queue) -> list[list[int]]:
    """The instructions of each item of a queue."""
    at = np.flatnonzero(columns.queue == queue)
    part = columns.items[queue]
    ends = np.searchsorted(at, part.last, side="right")
    return [chunk.tolist() for chunk in np.split(at, ends[:-1])] if len(part) else []
