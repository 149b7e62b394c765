"""What each instruction reads, writes and computes, on the memories of a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.array import bias_words, bytes_read, gather, product, to_blocks
from accel_sim.engine.errors import refuse
from accel_sim.engine.output import add, look_up, requantize
from accel_sim.engine.scratchpad import Box, Memory
from accel_sim.engine.vector import BINARY, POOLS, element_wise, pool
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import (
    Load,
    Loops,
    Matmul,
    Output,
    Program,
    Space,
    Store,
    Vector,
    VectorFunction,
    Window,
)

WORD_BYTES = 4
"""Accumulator words are int32 wherever values are computed."""

_MOST_TAPS = 1 << 25
"""Taps of all positions of a window; more is no window but damage."""

T = TypeVar("T")


@dataclass(frozen=True)
class Effect:
    """``compute`` gives the bytes to write: (samples or 1, *write.shape). ``reads`` are checked before it is called."""

    index: int
    reads: tuple[Box, ...]
    write: Box
    compute: Callable[[], NDArray[np.uint8]]


def _entry(table: Sequence[T], at: int, what: str, index: int) -> T:
    if not 0 <= at < len(table):
        raise refuse(index, f"{what} {at} does not exist")
    return table[at]


def _check_tables(program: Program) -> None:
    """ProgramError for descriptors that describe nothing: windows without room, bytes beyond a byte."""
    for index, window in enumerate(program.windows):
        sizes = (window.images, window.channels, *window.extent, *window.out, *window.kernel)
        if min(sizes) < 1 or prod(window.out) * prod(window.kernel) > _MOST_TAPS:
            raise ProgramError(f"images, channels, extent, out and kernel of {sizes}", "windows", index)
    for index, output in enumerate(program.outputs):
        if not all(-256 < value < 256 for value in (output.zero_point, output.low, output.high)):
            raise ProgramError("a zero point or limit beyond a byte", "outputs", index)
    for index, vector in enumerate(program.vectors):
        if not all(-256 < value < 256 for value in (vector.zero_point, vector.low, vector.high)):
            raise ProgramError("a zero point or limit beyond a byte", "vectors", index)
    for index, how in enumerate(program.sums):
        if not (-256 < how.low < 256 and -256 < how.high < 256):
            raise ProgramError("a limit beyond a byte", "sums", index)
    for index, table in enumerate(program.tables):
        if len(table) != 256:
            raise ProgramError(f"a table of {len(table)} bytes, not 256", "tables", index)


def _int32(values: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Bytes (..., 4 n), the last axis contiguous or copied, as words (..., n)."""
    return np.ascontiguousarray(values).view(np.int32)


def _shared(box: Box) -> NDArray[np.uint8]:
    """The bytes of a box, (1, ...) where all samples have the same."""
    values = box.values()
    return values if box.some_vary() else values[:1]


class Effects:
    """The effects of a program's instructions on ``dram``, ``scratchpad`` and ``accumulators``."""

    def __init__(self, program: Program, dram: Memory, scratchpad: Memory, accumulators: Memory) -> None:
        self.program = program
        self.dram = dram
        self.scratchpad = scratchpad
        self.accumulators = accumulators
        self.scales = np.array(program.scales, np.float32)
        _check_tables(program)

    def of(self, index: int) -> Effect | None:
        """The effect of instruction ``index``; None of a preload.

        ProgramError where it reaches beyond a memory, or refers to a descriptor that does not exist.
        """
        instruction = self.program.code[index]
        if isinstance(instruction, Load):
            effect = self._load(index, instruction)
        elif isinstance(instruction, Store):
            effect = self._store(index, instruction)
        elif isinstance(instruction, Matmul):
            effect = self._matmul(index, instruction)
        elif isinstance(instruction, Vector):
            effect = self._vector(index, instruction)
        else:
            return None
        for box in (*effect.reads, effect.write):
            box.check(index)
        return effect

    def _load(self, index: int, load: Load) -> Effect:
        loops = load.loops
        shape = (*loops.counts, loops.run)
        source = Box(self.dram, load.dram_address, shape, (*loops.dram_strides, 1))
        memory = self.accumulators if load.space == Space.ACCUMULATOR else self.scratchpad
        target = Box(memory, load.chip_address, shape, (*loops.chip_strides, 1))
        return Effect(index, (source,), target, lambda: _shared(source))

    def _store(self, index: int, store: Store) -> Effect:
        loops = store.loops
        shape = (*loops.counts, loops.run)
        memory = self.scratchpad if store.to_scratchpad else self.dram
        target = Box(memory, store.address, shape, (*loops.dram_strides, 1))
        if store.output < 0:
            if store.residual_address >= 0:
                raise refuse(index, "bytes that are stored as they are have no residual")
            source = Box(self.accumulators, store.accumulator_address, shape, (*loops.chip_strides, 1))
            return Effect(index, (source,), target, lambda: _shared(source))
        output = _entry(self.program.outputs, store.output, "output", index)
        self._check_aligned(index, store.accumulator_address)
        words = Box(
            self.accumulators,
            store.accumulator_address,
            (*shape, WORD_BYTES),
            (*(stride * WORD_BYTES for stride in loops.chip_strides), WORD_BYTES, 1),
        )
        if output.table >= 0:
            _entry(self.program.tables, output.table, "table", index)
        if store.residual_address < 0:
            return Effect(index, (words,), target, lambda: self._results(index, store, output, words))
        how = _entry(self.program.sums, output.sum, "sum", index)
        if output.sum_table >= 0:
            _entry(self.program.tables, output.sum_table, "table", index)
        other = Box(self.accumulators, store.residual_address, shape, (*loops.chip_strides, 1))

        def summed() -> NDArray[np.uint8]:
            values = add(self._results(index, store, output, words), other.values(), how)
            return values if output.sum_table < 0 else look_up(values, self.program.tables[output.sum_table])

        return Effect(index, (words, other), target, summed)

    def _results(self, index: int, store: Store, output: Output, words: Box) -> NDArray[np.uint8]:
        """A store's accumulator words as bytes, before a residual is added."""
        scales = self._scales(index, store.loops, store, output)
        values = requantize(words.values().view(np.int32)[..., 0], scales, output)
        return values if output.table < 0 else look_up(values, self.program.tables[output.table])

    def _scales(self, index: int, loops: Loops, store: Store, output: Output) -> NDArray[np.float32]:
        """The scale of each element of a store, to be broadcast to (counts, run)."""
        if not output.per_channel:
            return np.float32(_entry(self.program.scales, output.scales, "scale", index)) * np.ones(1, np.float32)
        blocks = np.arange(loops.counts[0]) * store.block_channels
        channels = output.scales + store.first_channel + blocks[:, None] + np.arange(store.lanes)
        if channels.size and (channels.min() < 0 or channels.max() >= len(self.scales)):
            raise refuse(index, f"scales {channels.min()} to {channels.max()} of {len(self.scales)}")
        scales = np.tile(self.scales[channels], (1, loops.run // store.lanes))
        return scales.reshape(loops.counts[0], 1, 1, loops.run)

    def _stored(self, index: int, address: int, window: Window, first_channel: int, channels: int) -> Box:
        """What a window reads of the map in the scratchpad at ``address``."""
        box = Box(self.scratchpad, address, (window.images * window.channels * prod(window.extent),))
        box.check(index)
        return replace(box, used=bytes_read(window, first_channel, channels, self.program.columns))

    def _check_aligned(self, index: int, address: int) -> None:
        if address % WORD_BYTES:
            raise refuse(index, f"accumulator address {address} is no multiple of {WORD_BYTES}")

    def _matmul(self, index: int, matmul: Matmul) -> Effect:
        window = _entry(self.program.windows, matmul.window, "window", index)
        columns = self.program.columns
        m, n = window.images * prod(window.out), matmul.filters
        k = prod(window.kernel) * matmul.channels
        if matmul.first_channel < 0 or matmul.first_channel + matmul.channels > window.channels:
            raise refuse(index, f"channels beyond the {window.channels} of the map")
        self._check_aligned(index, matmul.accumulator_address)
        weights = Box(self.scratchpad, matmul.weight_address, (k * n,))
        sums = Box(self.accumulators, matmul.accumulator_address, (m * n * WORD_BYTES,))
        weights.check(index)
        sums.check(index)
        stored = self._stored(index, matmul.input_address, window, matmul.first_channel, matmul.channels)
        reads = [stored, weights]
        begin: Box | None = None
        if matmul.accumulate:
            reads.append(sums)
        elif matmul.bias_address >= 0:
            begin = Box(self.scratchpad, matmul.bias_address, (n * WORD_BYTES,))
            reads.append(begin)

        def compute() -> NDArray[np.uint8]:
            taps = gather(_shared(stored), window, columns, matmul.first_channel, matmul.channels)
            right = _shared(weights)
            left = taps.reshape(len(taps), m, k)
            if len(right) > len(left):
                left = np.broadcast_to(left, (len(right), m, k))
            total = to_blocks(product(left, window.signed, right.reshape(-1, k, n)), columns)
            if matmul.accumulate:
                total = total + _int32(_shared(sums))
            elif begin is not None:
                total = total + bias_words(_int32(_shared(begin)), m, columns)
            return total.view(np.uint8)

        return Effect(index, tuple(reads), sums, compute)

    def _vector(self, index: int, vector: Vector) -> Effect:
        program = self.program
        spec = _entry(program.vectors, vector.spec, "vector specification", index)
        target = Box(self.accumulators, vector.output_address, (vector.elements,))
        if spec.function == VectorFunction.FILL:
            value = np.full((1, vector.elements), spec.zero_point & 0xFF, np.uint8)
            return Effect(index, (), target, lambda: value)
        if spec.function in POOLS:
            window = _entry(program.windows, spec.window, "window", index)
            size = window.images * window.channels
            if vector.elements != size * prod(window.out):
                raise refuse(index, f"a pool of {size * prod(window.out)} results, not {vector.elements}")
            stored = self._stored(index, vector.a_address, window, 0, window.channels)
            return Effect(index, (stored,), target, lambda: pool(_shared(stored), spec, window, program.columns))
        if spec.function == VectorFunction.TABLE:
            _entry(program.tables, spec.table, "table", index)
        if spec.function == VectorFunction.SUM:
            _entry(program.sums, spec.sum, "sum", index)
        a = Box(self.scratchpad, vector.a_address, (vector.elements,))
        if spec.function not in BINARY:
            return Effect(index, (a,), target, lambda: element_wise(program, spec, _shared(a), None))
        b = Box(self.scratchpad, vector.b_address, (vector.elements,))
        return Effect(index, (a, b), target, lambda: element_wise(program, spec, a.values(), b.values()))
