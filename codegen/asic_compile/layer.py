"""One convolution or GEMM as instructions: the tiling that the price list chose, its buffers, and the tokens.

Buffers. What changes from step to step has as many slots as the machine has buffers, and step s uses slot s modulo
their number; a held operand has a slot per position tile, filter tile or group. The biases of a tile of several steps
have one place. Weights lie in DRAM in the order of their loads, each piece with its biases in front.

Tokens. The load of step s waits until step s - buffers has been computed, the first step of output tile o until tile
o - buffers has been stored; each token is posted only if somebody waits for it, so that none is left at the barrier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.pricing.array import OUTPUT_STATIONARY
from accel_sim.pricing.price_list import LayerPrice
from accel_sim.program.isa import Dataflow, Load, Matmul, Preload, Space, Store, Token, Window
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.tiles import PositionTile, Step, Tiling, position_tiles, steps
from codegen.asic_compile.transfers import (
    StoredPiece,
    TilePart,
    Transfer,
    WholeMap,
    load_piece,
    nested,
    tile_parts,
)

WORD_BYTES = 4


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A priced layer with its values and places.

    ``weight``: int8, (filters, channels of a group, taps); ``bias``: int32 (filters,), with the input's zero point in
    it, where the layer is priced with a bias. ``kernel`` and ``dilations`` are (depth, height, width). ``input`` and
    ``output`` lie in the scratchpad where the price says so. ``input_begin``/``input_end``: bytes of the scratchpad's
    part for inputs (of all of it, where the machine shares it) that no such map takes. ``output_entry``: number of the
    :class:`accel_sim.program.isa.Output`.
    """

    price: LayerPrice
    weight: NDArray[np.int8]
    bias: NDArray[np.int32] | None
    kernel: tuple[int, int, int]
    dilations: tuple[int, int, int]
    pad_value: int
    signed: bool
    input: WholeMap
    output: WholeMap
    residual: WholeMap | None
    output_entry: int
    input_begin: int
    input_end: int


def lower_layer(builder: Builder, task: LayerTask) -> None:
    """Appends the instructions of ``task``, from one barrier to the next."""
    _Lowering(builder, task).run()


class _Lowering:
    def __init__(self, builder: Builder, task: LayerTask) -> None:
        self.builder = builder
        self.task = task
        self.columns = builder.columns
        self.layer = layer = task.price.layer
        self.tiling = tiling = Tiling.of(layer, task.price.record)
        self.on_chip = task.price.input_on_chip
        self.tiles = position_tiles(layer, tiling)
        self.steps = list(steps(tiling, len(self.tiles)))
        self.buffers = 2 if builder.spec.scratchpads.double_buffered else 1
        self.output_tiles = self.steps[-1].output + 1
        self.in_flight = min(self.buffers, len(self.steps))
        self.total_channels = layer.channels * layer.groups
        self.aligned_output = tiling.groups == 1 or tiling.filters % self.columns == 0
        self._weights: dict[tuple[int, int, int], int] = {}
        self._matrices: dict[int, NDArray[np.int8]] = {}
        builder.separate_constants()

        # The scratchpad.
        self._most_read = max(len(tile.images) * prod(map(len, tile.read)) for tile in self.tiles)
        self._input_slots, end = self._input_places(task.input_begin)
        pads = builder.spec.scratchpads
        begin = end if pads.shared_input_weight else pads.input_kib * 1024
        self._bias_address, self._weight_slots, weights_end = self._weight_places(begin)
        limit = task.input_end if pads.shared_input_weight else (pads.input_kib + pads.weight_kib) * 1024
        assert end <= task.input_end and weights_end <= limit, "the tiling does not fit the scratchpad"

        # The accumulator memory: sums, then the residuals that wait for them.
        positions = max(len(tile.images) * prod(map(len, tile.out)) for tile in self.tiles)
        self._tile_words = positions * tiling.tile_filters
        self._tile_slots = min(self.buffers, self.output_tiles)
        used = self._tile_slots * self._tile_words * (WORD_BYTES + (1 if layer.residual else 0))
        assert used <= pads.accumulator_kib * 1024, "the tiling does not fit the accumulators"

    def run(self) -> None:
        loads = [self._loads(step) for step in self.steps]
        emit = self.builder.code.append
        stationary = self.tiling.dataflow != OUTPUT_STATIONARY
        for step, transfers in zip(self.steps, loads, strict=True):
            ahead = step.number + self.buffers
            for i, load in enumerate(transfers):
                first, last = i == 0, i == len(transfers) - 1
                freed = Token.FREED if first and step.number >= self.buffers else Token.NONE
                emit(replace(load, chained=not first, wait=freed, post=Token.LOADED if last else Token.NONE))
            wait = Token.LOADED if transfers else Token.NONE
            if step.channel == 0 and step.output >= self.buffers:
                wait |= Token.STORED
            post = Token.FREED if ahead < len(loads) and loads[ahead] else Token.NONE
            ends = step.channel == self.tiling.channel_tiles - 1
            if ends:
                post |= Token.COMPUTED
            if stationary:
                emit(Preload(wait=wait))
            emit(replace(self._matmul(step), wait=Token.NONE if stationary else wait, post=post))
            if ends:
                for store in self._stores(step):
                    emit(store)

    # Places.

    def _lanes(self, group: int, channel: int, held: bool) -> range:
        """Channels in whole blocks that tile ``channel`` along K loads, as in ``tiling.input_piece``."""
        own = self.tiling.channel_range(channel)
        begin = group * self.tiling.channels
        first = (begin + own.start) // self.columns * self.columns
        if held and channel:
            first = -(-(begin + own.start) // self.columns) * self.columns
        last = min(-(-(begin + own.stop) // self.columns) * self.columns, self.total_channels)
        return range(first, max(first, last))

    def _held_lanes(self, group: int) -> range:
        last = self._lanes(group, self.tiling.channel_tiles - 1, False)
        return range(self._lanes(group, 0, False).start, last.stop)

    def _input_places(self, begin: int) -> tuple[list[int], int]:
        """Where the slots of the input begin, and where they end."""
        tiling, groups = self.tiling, range(self.tiling.groups)
        if self.on_chip:
            return [], begin
        if tiling.hold_input:
            lanes = max(len(self._held_lanes(g)) for g in groups)
            if tiling.filters_first:
                sizes = [self.layer.batch * prod(self.layer.size) * lanes] * min(self.buffers, tiling.groups)
            else:
                sizes = [self._most_read * lanes] * min(self.buffers, len(self.tiles) * tiling.groups)
        else:
            lanes_of = [max(len(self._lanes(g, c, False)) for g in groups) for c in range(tiling.channel_tiles)]
            alternate = self.in_flight == tiling.channel_tiles == 2
            sizes = [self._most_read * n for n in (lanes_of if alternate else [max(lanes_of)] * self.in_flight)]
        return _consecutive(begin, sizes)

    def _weight_places(self, begin: int) -> tuple[int, list[int], int]:
        """The address of the one place for biases (-1: they lie before their weights), the slots, and the end."""
        tiling, taps = self.tiling, self.layer.taps
        bias = WORD_BYTES if self.layer.bias else 0
        whole = tiling.channels * taps + bias
        if tiling.hold_weights and not tiling.filters_first:
            sizes = [tiling.filters * whole] * min(self.buffers, tiling.groups)
        elif tiling.hold_weights:
            sizes = [tiling.tile_filters * whole] * min(self.buffers, tiling.filter_tiles * tiling.groups)
        elif tiling.channel_tiles == 1:
            sizes = [tiling.tile_filters * whole] * self.in_flight
        else:
            rows = [len(tiling.channel_range(c)) * taps for c in range(tiling.channel_tiles)]
            alternate = self.in_flight == tiling.channel_tiles == 2
            pieces = rows if alternate else [max(rows)] * self.in_flight
            slots, end = _consecutive(begin + tiling.tile_filters * bias, [n * tiling.tile_filters for n in pieces])
            return begin, slots, end
        return -1, *_consecutive(begin, sizes)

    def _weights_at(self, step: Step) -> tuple[int, int]:
        """Addresses of the biases and of the weights of a step."""
        tiling, taps = self.tiling, self.layer.taps
        bias = WORD_BYTES if self.layer.bias else 0
        n = len(tiling.filter_range(step.filter))
        slots = self._weight_slots
        if not tiling.hold_weights:
            slot = slots[step.number % len(slots)]
            return (slot, slot + n * bias) if self._bias_address < 0 else (self._bias_address, slot)
        if tiling.filters_first:
            at = slots[(step.group * tiling.filter_tiles + step.filter) % len(slots)]
        else:
            whole = tiling.channels * taps + bias
            at = slots[step.group % len(slots)] + step.filter * tiling.tile_filters * whole
        return at, at + n * (bias + tiling.channel_range(step.channel).start * taps)

    def _stored(self, step: Step) -> StoredPiece:
        """Where the input of a step lies."""
        tiling, tile = self.tiling, self.tiles[step.position]
        whole = (range(self.layer.size[0]), range(self.layer.size[1]), range(self.layer.size[2]))
        if self.on_chip:
            return StoredPiece(self.task.input.address, 0, 0, self.total_channels, whole)
        if not tiling.hold_input:
            lanes = self._lanes(step.group, step.channel, False)
            slot = self._input_slots[step.number % len(self._input_slots)]
            return StoredPiece(slot, tile.images.start, lanes.start, len(lanes), tile.read)
        lanes = self._held_lanes(step.group)
        if tiling.filters_first:
            slot = self._input_slots[step.group % len(self._input_slots)]
            return StoredPiece(slot, 0, lanes.start, len(lanes), whole)
        number = step.group * len(self.tiles) + step.position
        slot = self._input_slots[number % len(self._input_slots)]
        return StoredPiece(slot, tile.images.start, lanes.start, len(lanes), tile.read)

    def _tile_at(self, step: Step) -> tuple[int, int]:
        """Addresses of a tile's sums and of its residual."""
        slot = step.output % self._tile_slots
        residuals = self._tile_slots * self._tile_words * WORD_BYTES
        return slot * self._tile_words * WORD_BYTES, residuals + slot * self._tile_words

    # Instructions, tokens apart.

    def _loads(self, step: Step) -> list[Load]:
        tile = self.tiles[step.position]
        transfers: list[Transfer] = []
        if step.loads_input and not self.on_chip:
            lanes = self._lanes(step.group, step.channel, self.tiling.hold_input)
            fresh = self.tiling.hold_input and self.tiling.filters_first
            box = tile.fresh if fresh else tile.read
            target = self._stored(step)
            transfers += load_piece(self.task.input, target, tile.images, lanes, box, self.columns)
        if step.loads_weights:
            transfers += self._weight_loads(step)
        loads = [Load(t.dram_address, t.chip_address, t.loops) for t in transfers]
        if self.task.residual is not None and step.channel == 0:
            place = self._tile_at(step)[1]
            for part in self._parts(self.task.residual, step):
                loops = part.loops
                dims = list(zip(loops.counts, loops.dram_strides, loops.chip_strides, strict=True))
                for t in nested(self.task.residual.address + part.offset, place + part.tile_offset, dims, loops.run):
                    loads.append(Load(t.dram_address, t.chip_address, t.loops, Space.ACCUMULATOR))
        return loads

    def _weight_loads(self, step: Step) -> list[Transfer]:
        tiling = self.tiling
        filters = tiling.filter_range(step.filter)
        bias = len(filters) * WORD_BYTES if self.layer.bias and step.channel == 0 else 0
        weights = len(filters) * len(tiling.channel_range(step.channel)) * self.layer.taps
        source = self._weight_constant(step)
        bias_at, weights_at = self._weights_at(step)
        if not bias:
            return nested(source, weights_at, [], weights)
        if bias_at + bias == weights_at:
            return nested(source, bias_at, [], bias + weights)
        return nested(source, bias_at, [], bias) + nested(source + bias, weights_at, [], weights)

    def _weight_constant(self, step: Step) -> int:
        """DRAM address of a piece: biases, if it is the first of its filters, then the K x N matrix."""
        key = step.group, step.filter, step.channel
        if key not in self._weights:
            tiling = self.tiling
            filters, channels = tiling.filter_range(step.filter), tiling.channel_range(step.channel)
            matrix = self._matrix(step.group)[:, channels.start : channels.stop, filters.start : filters.stop]
            data = matrix.tobytes()
            if self.layer.bias and step.channel == 0:
                assert self.task.bias is not None, "a layer that is priced with a bias has one"
                first = step.group * tiling.filters
                words = self.task.bias[first + filters.start : first + filters.stop]
                data = words.astype("<i4").tobytes() + data
            self._weights[key] = self.builder.constant(data)
        return self._weights[key]

    def _matrix(self, group: int) -> NDArray[np.int8]:
        """(taps, channels, filters) of a pack of groups, block-diagonal."""
        if group not in self._matrices:
            tiling, layer = self.tiling, self.layer
            matrix = np.zeros((layer.taps, tiling.channels, tiling.filters), np.int8)
            for i in range(tiling.pack):
                first = (group * tiling.pack + i) * layer.filters
                rows = slice(i * layer.channels, (i + 1) * layer.channels)
                columns = slice(i * layer.filters, (i + 1) * layer.filters)
                matrix[:, rows, columns] = self.task.weight[first : first + layer.filters].transpose(2, 1, 0)
            self._matrices = {group: matrix}
        return self._matrices[group]

    def _matmul(self, step: Step) -> Matmul:
        layer, tiling, tile = self.layer, self.tiling, self.tiles[step.position]
        stored = self._stored(step)
        channels = tiling.channel_range(step.channel)
        bias_at, weights_at = self._weights_at(step)
        per_image = stored.channels * prod(stored.extent)
        return Matmul(
            window=self.builder.window(self._window(tile, stored)),
            input_address=stored.address + (tile.images.start - stored.first_image) * per_image,
            weight_address=weights_at,
            accumulator_address=self._tile_at(step)[0],
            channels=len(channels),
            filters=len(tiling.filter_range(step.filter)),
            first_channel=step.group * tiling.channels + channels.start - stored.first_channel,
            bias_address=bias_at if layer.bias and step.channel == 0 else -1,
            accumulate=step.channel > 0,
            dataflow=Dataflow(tiling.dataflow),
        )

    def _window(self, tile: PositionTile, stored: StoredPiece) -> Window:
        layer = self.layer
        origin: Any = tuple(
            tile.out[axis].start * layer.stride[axis] - layer.pad[axis] - stored.box[axis].start for axis in range(3)
        )
        out: Any = tuple(map(len, tile.out))
        return Window(
            images=len(tile.images),
            channels=stored.channels,
            extent=stored.extent,
            out=out,
            kernel=self.task.kernel,
            strides=layer.stride,
            dilations=self.task.dilations,
            origin=origin,
            pad_value=self.task.pad_value,
            signed=self.task.signed,
        )

    def _parts(self, target: WholeMap, step: Step) -> list[TilePart]:
        tile, own = self.tiles[step.position], self.tiling.filter_range(step.filter)
        first = step.group * self.tiling.filters
        channels = range(first + own.start, first + own.stop)
        return tile_parts(target, tile.images, tile.out, channels, self.columns, self.aligned_output)

    def _stores(self, step: Step) -> list[Store]:
        sums, residual = self._tile_at(step)
        parts = self._parts(self.task.output, step)
        stored = Token.STORED if step.output + self.buffers < self.output_tiles else Token.NONE
        return [
            Store(
                address=self.task.output.address + part.offset,
                accumulator_address=sums + part.tile_offset * WORD_BYTES,
                loops=part.loops,
                lanes=part.lanes,
                output=self.task.output_entry,
                first_channel=part.channel,
                block_channels=part.block_channels,
                residual_address=-1 if self.task.residual is None else residual + part.tile_offset,
                to_scratchpad=self.task.price.output_on_chip,
                chained=i > 0,
                wait=Token.COMPUTED if i == 0 else Token.NONE,
                post=stored if i == len(parts) - 1 else Token.NONE,
            )
            for i, part in enumerate(parts)
        ]


def _consecutive(begin: int, sizes: list[int]) -> tuple[list[int], int]:
    """Where pieces of ``sizes`` begin that follow each other, and where the last one ends."""
    places = []
    for size in sizes:
        places.append(begin)
        begin += size
    return places, begin
