"""A program as columns: what its timing needs to know of each instruction, and the items that queues carry out.

An item is what begins and ends as one: an instruction of the execute queue, or a request of the load or store queue
(the head and the instructions chained to it).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.dma import contiguous_runs
from accel_sim.engine.errors import refuse
from accel_sim.pricing.array import gemm_cycles
from accel_sim.pricing.machine import RATE, machine_record
from accel_sim.program.isa import (
    Dataflow,
    Halt,
    Host,
    Load,
    Matmul,
    Preload,
    Program,
    Queue,
    Store,
    Sync,
    Token,
    Vector,
)
from accel_sim.spec import MachineSpec

BARRIER = 3
"""The queue of Sync, Host and Halt."""

_MAY_WAIT = (int(Token.FREED), int(Token.LOADED | Token.STORED), int(Token.COMPUTED), 0)
_MAY_POST = (int(Token.LOADED), int(Token.FREED | Token.COMPUTED), int(Token.STORED), 0)
_DATAFLOW_NAMES = {
    Dataflow.WEIGHT_STATIONARY: "ws",
    Dataflow.OUTPUT_STATIONARY: "os",
    Dataflow.INPUT_STATIONARY: "is",
}


@dataclass(frozen=True)
class Items:
    """What one queue carries out, in order; arrays of one entry per item.

    ``first``/``last``: instructions of the code. ``segment``: how many barriers stand before. ``cycles``: of data on
    the channel, of the way into the scratchpad, or of the array or vector unit. ``local``: not over the channel.
    ``waits``/``posts`` hold, per kind of token, which one of its kind in all the program is waited for or posted,
    shape (4, items), -1 for none; the kinds in the order of their bits.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    segment: NDArray[np.int64]
    cycles: NDArray[np.int64]
    local: NDArray[np.bool_]
    waits: NDArray[np.int64]
    posts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class Columns:
    """``queue`` to ``results`` have one entry per instruction.

    ``cycles`` are those of the array, the vector unit or the way into the scratchpad; the channel's are counted by the
    request (:class:`Items`). ``payload_bytes`` cross between DRAM and chip, in ``moved_bytes`` of whole bursts.
    ``gemms``: M, K, N and dataflow of a Matmul, else 0. ``operations``: of the vector unit. ``results``: accumulator
    words that a store takes out. ``barriers``: the index of each barrier instruction; the last one is the Halt.
    ``items``: those of the load, execute and store queue.
    """

    queue: NDArray[np.int8]
    segment: NDArray[np.int64]
    cycles: NDArray[np.int64]
    payload_bytes: NDArray[np.int64]
    moved_bytes: NDArray[np.int64]
    gemms: NDArray[np.int64]
    operations: NDArray[np.int64]
    results: NDArray[np.int64]
    barriers: NDArray[np.int64]
    items: tuple[Items, Items, Items]


def decode(program: Program, spec: MachineSpec) -> Columns:
    """The columns of ``program`` on ``spec``.

    ProgramError, with the instruction's index, for what no machine can begin: a descriptor that does not exist, a
    chain without a head, a preload without its Matmul, a dataflow that the array has not, tokens of another queue's,
    tokens left over at a barrier, a program that does not end with one Halt.
    """
    machine = machine_record(spec)[0]
    code = program.code
    count = len(code)
    queue = np.empty(count, np.int8)
    rows: list[tuple[int, int, bool, int]] = []  # wait, post, chained, way into the scratchpad
    cycles = np.zeros(count, np.int64)
    transfers: list[tuple[int, ...]] = []
    transfer_at: list[int] = []
    gemms = np.zeros((count, 4), np.int64)
    operations = np.zeros(count, np.int64)
    results = np.zeros(count, np.int64)
    seen: dict[tuple[int, ...], int] = {}
    preload = -1
    for index, instruction in enumerate(code):
        if preload >= 0 and queue_of(instruction) in (Queue.EXECUTE, BARRIER) and not isinstance(instruction, Matmul):
            raise refuse(preload, "a preload is followed by the Matmul that it belongs to")
        if isinstance(instruction, Load):
            queue[index] = Queue.LOAD
            loops = instruction.loops
            transfers.append((loops.run, *loops.counts, *loops.dram_strides))
            transfer_at.append(index)
            rows.append((instruction.wait, instruction.post, instruction.chained, 0))
        elif isinstance(instruction, Store):
            queue[index] = Queue.STORE
            loops = instruction.loops
            elements = loops.run * prod(loops.counts)
            if instruction.lanes < 1 or loops.run % instruction.lanes:
                raise refuse(index, f"a run of {loops.run} is no multiple of its {instruction.lanes} lanes")
            if instruction.to_scratchpad:
                cycles[index] = elements // instruction.lanes
            else:
                transfers.append((loops.run, *loops.counts, *loops.dram_strides))
                transfer_at.append(index)
            if instruction.output >= 0:
                results[index] = elements
            rows.append((instruction.wait, instruction.post, instruction.chained, int(instruction.to_scratchpad)))
        elif isinstance(instruction, Matmul):
            queue[index] = Queue.EXECUTE
            if not 0 <= instruction.window < len(program.windows):
                raise refuse(index, f"window {instruction.window} does not exist")
            window = program.windows[instruction.window]
            m = window.images * prod(window.out)
            gemm = (m, prod(window.kernel) * instruction.channels, instruction.filters, int(instruction.dataflow))
            if gemm not in seen:
                if min(gemm[:3]) < 1:
                    raise refuse(index, f"a product of {m} x {gemm[1]} x {gemm[2]} is none")
                if _DATAFLOW_NAMES[Dataflow(instruction.dataflow)] not in spec.array.dataflows:
                    raise refuse(index, f"{spec.name} has no {Dataflow(instruction.dataflow).name.lower()} dataflow")
                seen[gemm] = gemm_cycles(machine, gemm[3], m, gemm[1], gemm[2])
            cycles[index] = seen[gemm]
            if preload >= 0:
                if instruction.dataflow == Dataflow.OUTPUT_STATIONARY:
                    raise refuse(preload, "an output-stationary product has nothing to preload")
                cycles[index] -= spec.array.rows
                preload = -1
            gemms[index] = gemm
            rows.append((instruction.wait, instruction.post, False, 0))
        elif isinstance(instruction, Preload):
            queue[index] = Queue.EXECUTE
            cycles[index] = spec.array.rows
            preload = index
            rows.append((instruction.wait, instruction.post, False, 0))
        elif isinstance(instruction, Vector):
            queue[index] = Queue.EXECUTE
            if instruction.operations < 0 or instruction.elements < 0:
                raise refuse(index, "a vector instruction counts less than nothing")
            cycles[index] = -(-instruction.operations // spec.vector.lanes)
            operations[index] = instruction.operations
            rows.append((instruction.wait, instruction.post, False, 0))
        else:
            queue[index] = BARRIER
            rows.append((0, 0, False, 0))
    if not count or not isinstance(code[-1], Halt):
        raise refuse(max(count - 1, 0), "the last instruction of a program is a Halt")
    table = np.array(rows, np.int64)
    barriers = np.flatnonzero(queue == BARRIER)
    early = [int(at) for at in barriers[:-1] if isinstance(code[at], Halt)]
    if early:
        raise refuse(early[0], "a Halt that is not the last instruction")
    segment = np.cumsum(queue == BARRIER) - (queue == BARRIER)
    for at, masks, verb in ((0, _MAY_WAIT, "waits for"), (1, _MAY_POST, "posts")):
        wrong = np.flatnonzero(table[:, at] & ~np.array(masks, np.int64)[queue])
        if len(wrong):
            raise refuse(int(wrong[0]), f"its queue never {verb} {Token(int(table[wrong[0], at]))!r}")

    payload, moved = np.zeros(count, np.int64), np.zeros(count, np.int64)
    if transfers:
        shapes = np.array(transfers, np.int64)
        negative = np.flatnonzero((shapes[:, :4] < 0).any(axis=1))
        if len(negative):
            raise refuse(transfer_at[int(negative[0])], "a transfer counts less than nothing")
        length, runs = contiguous_runs(shapes)
        payload[transfer_at] = length * runs
        moved[transfer_at] = -(-length // machine["burst"]) * machine["burst"] * runs
    items = tuple(
        _items(at, queue, table, segment, cycles, moved, int(machine["rate"]))
        for at in (Queue.LOAD, Queue.EXECUTE, Queue.STORE)
    )
    _check_balance(items, segment, barriers)
    return Columns(
        queue, segment, cycles, payload, moved, gemms, operations, results, barriers, (items[0], items[1], items[2])
    )


def queue_of(instruction: Any) -> int:
    """The queue of an instruction, :data:`BARRIER` for those on which all queues meet."""
    if isinstance(instruction, Load):
        return Queue.LOAD
    if isinstance(instruction, Store):
        return Queue.STORE
    return BARRIER if isinstance(instruction, Sync | Host | Halt) else Queue.EXECUTE


def _items(
    which: Queue,
    queue: NDArray[np.int8],
    table: NDArray[np.int64],
    segment: NDArray[np.int64],
    cycles: NDArray[np.int64],
    moved: NDArray[np.int64],
    rate: int,
) -> Items:
    """Groups the instructions of one queue into items; checks chains."""
    at = np.flatnonzero(queue == which)
    wait, post, chained, local = table[at].T
    heads = np.flatnonzero(chained == 0)
    if len(at) and chained[0]:
        raise refuse(int(at[0]), "a chained transfer without one before it")
    split = np.flatnonzero((chained[1:] == 1) & (segment[at[1:]] != segment[at[:-1]])) if len(at) else at
    if len(split):
        raise refuse(int(at[split[0] + 1]), "a chained transfer behind a barrier")
    if ((chained == 1) & (wait != 0)).any():
        raise refuse(int(at[np.flatnonzero((chained == 1) & (wait != 0))[0]]), "a chained transfer waits for nothing")
    lasts = np.append(heads[1:] - 1, len(at) - 1) if len(heads) else heads
    inner = np.ones(len(at), np.bool_)
    inner[lasts] = False
    if (inner & (post != 0)).any():
        raise refuse(int(at[np.flatnonzero(inner & (post != 0))[0]]), "only the last transfer of a request posts")
    mixed = np.flatnonzero((chained[1:] == 1) & (local[1:] != local[:-1])) if len(at) else at
    if len(mixed):
        raise refuse(int(at[mixed[0] + 1]), "a request goes one way: over the channel or into the scratchpad")
    if len(heads):
        data = -(-np.add.reduceat(moved[at], heads) * RATE // rate)
        own = np.add.reduceat(cycles[at], heads)
    else:
        data = own = np.zeros(0, np.int64)
    is_local = local[heads] == 1
    on_channel = np.full(len(heads), which != Queue.EXECUTE) & ~is_local
    bits = np.array([[1], [2], [4], [8]])
    waits, posts = (wait[heads] & bits) != 0, (post[lasts] & bits) != 0
    return Items(
        first=at[heads],
        last=at[lasts],
        segment=segment[at[heads]],
        cycles=np.where(on_channel, data, own),
        local=is_local,
        waits=np.where(waits, np.cumsum(waits, axis=1) - 1, -1),
        posts=np.where(posts, np.cumsum(posts, axis=1) - 1, -1),
    )


def _check_balance(items: tuple[Items, ...], segment: NDArray[np.int64], barriers: NDArray[np.int64]) -> None:
    """Between two barriers as many tokens of each kind are posted as are waited for."""
    for kind in range(4):
        posted, waited = np.zeros(len(barriers), np.int64), np.zeros(len(barriers), np.int64)
        for part in items:
            posted += np.bincount(part.segment[part.posts[kind] >= 0], minlength=len(barriers))
            waited += np.bincount(part.segment[part.waits[kind] >= 0], minlength=len(barriers))
        left = np.flatnonzero(posted > waited)
        if len(left):
            over = int(posted[left[0]] - waited[left[0]])
            raise refuse(int(barriers[left[0]]), f"{over} {Token(1 << kind).name} left over where all queues meet")
