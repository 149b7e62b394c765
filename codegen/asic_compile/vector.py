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


def lower_elements(
    builder: Builder,
    spec: VectorSpec,
    operands: Sequence[NDArray[np.int64]],
    target: int,
    operations: int,
    chunks: int,
    missing: tuple[NDArray[np.bool_], VectorSpec] | None = None,
) -> None:
    """An element-wise function: ``operands`` hold, per element of the result in the order of its bytes from ``target``
    on, the DRAM address of what it is made from.

    ``missing``: elements that come from nowhere, and the specification that fills them (of one operand only).
    """
    elements = len(operands[0])
    chunks = min(chunks, elements)
    buffers = buffer_count(builder)
    most = -(-elements // chunks)
    found = []
    number = builder.vectors.number(spec)
    for i in range(chunks):
        first, last = elements * i // chunks, elements * (i + 1) // chunks
        slot = i % buffers
        share = operations * (i + 1) // chunks - operations * i // chunks
        places = [(slot * len(operands) + j) * most for j in range(len(operands))]
        loads: list[Load] = []
        vectors: list[Vector] = []
        b_address = places[1] if len(places) > 1 else -1
        if missing is None:
            for place, sources in zip(places, operands, strict=True):
                loads += [Load(t.dram_address, t.chip_address, t.loops) for t in gather(sources[first:last], place)]
            vectors.append(Vector(number, places[0], slot * most, last - first, share, b_address))
        else:
            holes, fill = missing
            if holes[first:last].any():
                vectors.append(Vector(builder.vectors.number(fill), -1, slot * most, last - first, share))
            edges = np.flatnonzero(np.diff(np.concatenate(([True], holes[first:last], [True]))))
            for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                sources = operands[0][first + begin : first + end]
                loads += [Load(t.dram_address, t.chip_address, t.loops) for t in gather(sources, places[0] + begin)]
                work = 0 if holes[first:last].any() else share
                vectors.append(Vector(number, places[0] + begin, slot * most + begin, end - begin, work))
        store = Store(target + first, slot * most, Loops(last - first), lanes=1)
        found.append(Chunk(tuple(loads), tuple(vectors), (store,)))
    pads = builder.spec.scratchpads
    assert min(buffers, chunks) * most * len(operands) <= pads.input_kib * 1024, "the chunks do not fit the scratchpad"
    assert min(buffers, chunks) * most <= pads.accumulator_kib * 1024, "the chunks do not fit the accumulator memory"
    emit_chunks(builder, found)


@dataclass(frozen=True)
class PoolTask:
    """A pool of ``source`` into ``target``; ``window`` is that of the whole map, and ``spec`` without it."""

    source: WholeMap
    target: WholeMap
    window: Window
    spec: VectorSpec
    operations: int
    chunks: int


def lower_pool(builder: Builder, task: PoolTask) -> None:
    """A pool in pieces of blocks and rows; each loads the lines that its windows reach.

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
    found = []
    done = 0
    for image in range(task.source.images):
        for lanes, out, read in pieces:
            slot = len(found) % buffers
            stored = StoredPiece(slot * room_in, image, lanes.start, len(lanes), read)
            transfers: list[Transfer] = load_piece(task.source, stored, range(image, image + 1), lanes, read, columns)
            elements = len(lanes) * prod(map(len, out))
            share = task.operations * (done + elements) // total - task.operations * done // total
            done += elements
            spec = replace(task.spec, window=builder.windows.number(_window(task.window, out, stored)))
            vector = Vector(builder.vectors.number(spec), stored.address, slot * room_out, elements, share)
            parts = tile_parts(task.target, range(image, image + 1), out, lanes, columns, True)
            stores = tuple(
                Store(task.target.address + p.offset, slot * room_out + p.tile_offset, p.loops, p.lanes) for p in parts
            )
            loads = tuple(Load(t.dram_address, t.chip_address, t.loops) for t in transfers)
            found.append(Chunk(loads, (vector,), stores))
    emit_chunks(builder, found)


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
