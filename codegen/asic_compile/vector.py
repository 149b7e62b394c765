"""Operations of the vector unit as instructions: chunks of their operands in, bytes of the result out.

Chunk i uses the buffers of chunk i - 2, and the tokens are those of a layer of one step per tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.dma import moved_bytes
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.pipeline import pipeline_cycles
from accel_sim.pricing.tiling import channel_cycles
from accel_sim.program.isa import Load, Loops, Store, Token, Vector, VectorSpec, Window
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.gather import gather
from codegen.asic_compile.transfers import Box, StoredPiece, Transfer, WholeMap, load_piece, tile_parts
from passes.errors import UnsupportedError


@dataclass(frozen=True)
class Chunk:
    """Loads relative to the slots of the operands, the elements and operations of one chunk, and its stores."""

    loads: tuple[Load, ...]
    vectors: tuple[Vector, ...]
    stores: tuple[Store, ...]


def emit_chunks(builder: Builder, chunks: Sequence[Chunk]) -> None:
    """Appends chunks whose addresses are those of their slots, with the tokens between them."""
    buffers = buffer_count(builder)
    for i, chunk in enumerate(chunks):
        ahead, count = i + buffers, len(chunks)
        for j, load in enumerate(chunk.loads):
            first, last = j == 0, j == len(chunk.loads) - 1
            wait = Token.FREED if first and i >= buffers else Token.NONE
            builder.code.append(replace(load, chained=not first, wait=wait, post=Token.LOADED if last else Token.NONE))
        for j, vector in enumerate(chunk.vectors):
            first, last = j == 0, j == len(chunk.vectors) - 1
            wait = Token.LOADED if first and chunk.loads else Token.NONE
            if first and i >= buffers:
                wait |= Token.STORED
            post = Token.COMPUTED if last else Token.NONE
            if last and ahead < count and chunks[ahead].loads:
                post |= Token.FREED
            builder.code.append(replace(vector, wait=wait, post=post))
        for j, store in enumerate(chunk.stores):
            first, last = j == 0, j == len(chunk.stores) - 1
            wait = Token.COMPUTED if first else Token.NONE
            post = Token.STORED if last and ahead < count else Token.NONE
            builder.code.append(replace(store, chained=not first, wait=wait, post=post))


def buffer_count(builder: Builder) -> int:
    return 2 if builder.spec.scratchpads.double_buffered else 1


def chunk_cycles(builder: Builder, chunks: Sequence[Chunk]) -> int:
    """Cycles of chunks in the price list's event model."""
    machine = machine_record(builder.spec)[0]
    rate, burst, lanes = int(machine["rate"]), int(machine["burst"]), int(machine["lanes"])
    load, compute, store = np.zeros((3, len(chunks)), np.int64)
    for i, chunk in enumerate(chunks):
        loads = [(t.dram_address, t.loops.run, *t.loops.counts, *t.loops.dram_strides) for t in chunk.loads]
        stores = [(t.address, t.loops.run, *t.loops.counts, *t.loops.dram_strides) for t in chunk.stores]
        for times, transfers in ((load, loads), (store, stores)):
            if transfers:
                chained = np.arange(len(transfers)) > 0
                moved = moved_bytes(np.array(transfers, np.int64), chained.astype(np.int64), burst)
                times[i] = channel_cycles(int(moved.sum()), rate)
        compute[i] = sum(-(-vector.operations // lanes) for vector in chunk.vectors)
    how = buffer_count(builder), int(machine["latency"]), int(machine["pipelined"]), 1
    return int(pipeline_cycles(load, compute, store, len(chunks), *how))


@dataclass(frozen=True, eq=False)
class ElementTask:
    """An element-wise function: ``operands`` hold, per element of the result in the order of its bytes from ``target``
    on, the DRAM address of what it is made from.

    ``missing``: elements that come from nowhere, and the specification that fills them (of one operand only).
    ``chunks``: into how many pieces the price list cuts the work.
    """

    spec: VectorSpec
    operands: tuple[NDArray[np.int64], ...]
    target: int
    operations: int
    chunks: int
    missing: tuple[NDArray[np.bool_], VectorSpec] | None = None


def lower_elements(builder: Builder, task: ElementTask) -> int:
    """Appends an element-wise function; gives its cycles by the event model.

    In the chunks of the price list where all operands lie in one piece; else in the best of several numbers of chunks.
    """
    contiguous = task.missing is None and all((np.diff(sources) == 1).all() for sources in task.operands)
    pads, elements = builder.spec.scratchpads, len(task.operands[0])
    numbers = {task.chunks} if contiguous else {task.chunks, *(1 << i for i in range(9))}
    best: tuple[int, list[Chunk]] | None = None
    for number in sorted(min(number, elements) for number in numbers):
        held = min(buffer_count(builder), number) * -(-elements // number)
        if held * len(task.operands) <= pads.input_kib * 1024 and held <= pads.accumulator_kib * 1024:
            found = _element_chunks(builder, task, number)
            cycles = chunk_cycles(builder, found)
            if best is None or cycles < best[0]:
                best = cycles, found
    assert best is not None, "the price list's chunks fit"
    emit_chunks(builder, best[1])
    return best[0]


def _element_chunks(builder: Builder, task: ElementTask, chunks: int) -> list[Chunk]:
    operands, elements = task.operands, len(task.operands[0])
    most = -(-elements // chunks)
    number = builder.vectors.number(task.spec)
    found = []
    for i in range(chunks):
        first, last = elements * i // chunks, elements * (i + 1) // chunks
        share = task.operations * (i + 1) // chunks - task.operations * i // chunks
        slot = i % buffer_count(builder)
        places = [(slot * len(operands) + j) * most for j in range(len(operands))]
        result = slot * most
        loads: list[Load] = []
        vectors: list[Vector] = []
        if task.missing is None:
            for place, sources in zip(places, operands, strict=True):
                loads += _loads(gather(sources[first:last], place))
            other = places[1] if len(places) > 1 else -1
            vectors.append(Vector(number, places[0], result, last - first, share, other))
        else:
            holes, fill = task.missing
            here = holes[first:last]
            if here.any():
                vectors.append(Vector(builder.vectors.number(fill), 0, result, last - first, share))
            edges = np.flatnonzero(np.diff(np.concatenate(([True], here, [True])).astype(np.int8)))
            for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                loads += _loads(gather(operands[0][first + begin : first + end], places[0] + begin))
                work = 0 if here.any() else share
                vectors.append(Vector(number, places[0] + begin, result + begin, end - begin, work))
        store = Store(task.target + first, result, Loops(last - first), lanes=1)
        found.append(Chunk(tuple(loads), tuple(vectors), (store,)))
    return found


def _loads(transfers: Sequence[Transfer]) -> list[Load]:
    return [Load(t.dram_address, t.chip_address, t.loops) for t in transfers]


@dataclass(frozen=True)
class PoolTask:
    """A pool of ``source`` into ``target``; ``window`` is that of the whole map, and ``spec`` without it."""

    source: WholeMap
    target: WholeMap
    window: Window
    spec: VectorSpec
    operations: int
    chunks: int


def lower_pool(builder: Builder, task: PoolTask) -> int:
    """Appends a pool in pieces of blocks and rows, each of which loads the lines that its windows reach; gives its
    cycles by the event model.

    As many pieces as the price list has chunks, where blocks and rows allow, and more where they do not fit.
    """
    pads, buffers = builder.spec.scratchpads, buffer_count(builder)
    columns = builder.columns
    blocks = -(-task.source.channels // columns)
    wanted = max(1, -(-task.chunks // task.source.images))
    while True:
        pieces = _pieces(task, blocks, wanted, columns)
        room_in = max(len(lanes) * prod(map(len, read)) for lanes, _, read in pieces)
        room_out = max(len(lanes) * prod(map(len, out)) for lanes, out, _ in pieces)
        held = min(buffers, len(pieces) * task.source.images)
        if held * room_in <= pads.input_kib * 1024 and held * room_out <= pads.accumulator_kib * 1024:
            break
        if wanted > blocks * task.target.size[0] * task.target.size[1]:
            raise UnsupportedError("a pool of which not even a row fits the memories")
        wanted += 1
    total = task.target.images * task.target.channels * task.target.positions
    found: list[Chunk] = []
    done = 0
    for image in range(task.source.images):
        for lanes, out, read in pieces:
            slot = len(found) % buffers
            stored = StoredPiece(slot * room_in, image, lanes.start, len(lanes), read)
            transfers: list[Transfer] = load_piece(task.source, stored, range(image, image + 1), lanes, read, columns)
            elements = len(lanes) * prod(map(len, out))
            share = task.operations * (done + elements) // total - task.operations * done // total
            done += elements
            spec = replace(task.spec, window=builder.window(_window(task.window, out, stored)))
            vector = Vector(builder.vectors.number(spec), stored.address, slot * room_out, elements, share)
            parts = tile_parts(task.target, range(image, image + 1), out, lanes, columns, True)
            stores = tuple(
                Store(task.target.address + p.offset, slot * room_out + p.tile_offset, p.loops, p.lanes) for p in parts
            )
            found.append(Chunk(tuple(_loads(transfers)), (vector,), stores))
    emit_chunks(builder, found)
    return chunk_cycles(builder, found)


def _window(window: Window, out: Box, stored: StoredPiece) -> Window:
    origin: Any = tuple(
        out[axis].start * window.strides[axis] + window.origin[axis] - stored.box[axis].start for axis in range(3)
    )
    counts: Any = tuple(map(len, out))
    return replace(window, images=1, channels=stored.channels, extent=stored.extent, out=counts, origin=origin)


def _pieces(task: PoolTask, blocks: int, wanted: int, columns: int) -> list[tuple[range, Box, Box]]:
    """(channels, output box, input box) of about ``wanted`` pieces of an image."""
    depth, height, width = task.target.size
    per_piece = -(-blocks // min(wanted, blocks))
    lanes = [
        range(b * columns, min((b + per_piece) * columns, task.source.channels)) for b in range(0, blocks, per_piece)
    ]
    cuts = -(-wanted // len(lanes))
    if cuts == 1:
        boxes = [(range(depth), range(height), range(width))]
    else:
        rows = max(1, -(-height * depth // cuts))
        boxes = [
            (range(d, d + 1), range(h, min(h + rows, height)), range(width))
            for d in range(depth)
            for h in range(0, height, rows)
        ]
    return [(channels, box, _read(task, box)) for channels in lanes for box in boxes]


def _read(task: PoolTask, out: Box) -> Box:
    """What a piece loads: whole rows, and whole planes if it has all of them."""
    window, size = task.window, task.source.size
    found = []
    for axis in range(3):
        if axis == 2 or len(out[axis]) == task.target.size[axis]:
            found.append(range(size[axis]))
            continue
        begin = out[axis].start * window.strides[axis] + window.origin[axis]
        end = (out[axis].stop - 1) * window.strides[axis] + window.origin[axis]
        end += (window.kernel[axis] - 1) * window.dilations[axis] + 1
        begin = max(begin, 0)
        found.append(range(begin, max(min(end, size[axis]), begin)))
    return found[0], found[1], found[2]
