"""How a layer is cut into tiles: the candidates, and what each of them moves.

Output positions are cut along one axis - images, or depth, rows, or columns of a single image, whichever level comes
first that is small enough; filters in multiples of the array's columns; input channels in multiples of its rows. The
grids depend on layer and array alone, never on memory sizes, so that a machine with more memory has every candidate
of the smaller one and can only be faster.

Activations lie in DRAM in blocks of as many channels as the array has columns, weights in the order in which they
are loaded. A piece of a map that is not whole in height is one contiguous segment per channel block and plane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div
from accel_sim.pricing.machine import RATE

IMAGES, PLANES, ROWS, COLUMNS = 0, 1, 2, 3
"""Levels: which axis the positions are cut along."""

POSITIONS_FIRST, FILTERS_FIRST = 0, 1
"""Order: the outer loop runs over position tiles (input stays) or over filter tiles (weights stay)."""

MAX_TILES_PER_IMAGE = 1 << 16


@compiled
def split_sizes(total: int, sizes: NDArray[np.int64], include_whole: bool, powers_only: bool) -> int:
    """Writes the tile sizes worth trying for an axis of ``total`` into ``sizes``, largest first; gives their number."""
    count = 0
    if include_whole:
        sizes[0] = total
        count = 1
    parts = 2
    while True:
        size = ceil_div(total, min(parts, total))
        if size < total and (count == 0 or size < sizes[count - 1]):
            sizes[count] = size
            count += 1
        if parts >= total:
            return count
        if not powers_only and parts & (parts - 1) == 0:
            parts += parts // 2 if parts > 1 else 1  # 2, 3, 4, 6, 8, 12, ...
        elif powers_only:
            parts *= 2
        else:
            parts = parts // 3 * 4


@compiled
def multiples(total: int, unit: int, smaller: int, powers_only: bool, sizes: NDArray[np.int64]) -> int:
    """Writes ``smaller`` (if 0 < smaller < unit), multiples of ``unit`` below ``total``, and ``total`` into ``sizes``."""
    count = 0
    if 0 < smaller < min(unit, total):
        sizes[0] = smaller
        count = 1
    factor = 1
    while factor * unit < total:
        sizes[count] = factor * unit
        count += 1
        if powers_only or factor < 2:
            factor *= 2
        elif factor & (factor - 1) == 0:
            factor += factor // 2
        else:
            factor = factor // 3 * 4
    sizes[count] = total
    return count + 1


@compiled
def _covered(first: int, last: int, stride: int, reach: int, pad: int, size: int) -> int:
    """How many input lines the output lines ``first`` .. ``last`` read; padding is not loaded."""
    begin = max(first * stride - pad, 0)
    end = min(last * stride - pad + reach, size)
    return max(end - begin, 0)


@compiled
def position_tile_count(layer: Any, level: int, size: int) -> int:
    """Tiles per image (level :data:`IMAGES`: in all)."""
    if level == IMAGES:
        return ceil_div(layer.batch, size)
    if level == PLANES:
        return ceil_div(layer.out_d, size)
    if level == ROWS:
        return layer.out_d * ceil_div(layer.out_h, size)
    return layer.out_d * layer.out_h * ceil_div(layer.out_w, size)


@compiled
def position_tiles(
    layer: Any,
    level: int,
    size: int,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
) -> int:
    """Cuts the positions into tiles of ``size`` along ``level``; gives the number of tiles per image (or in all).

    Per tile: output positions; input elements per channel, halo included; contiguous segments per channel block.
    """
    all_d = _covered(0, layer.out_d - 1, layer.stride_d, layer.reach_d, layer.pad_d, layer.in_d)
    all_h = _covered(0, layer.out_h - 1, layer.stride_h, layer.reach_h, layer.pad_h, layer.in_h)
    all_w = _covered(0, layer.out_w - 1, layer.stride_w, layer.reach_w, layer.pad_w, layer.in_w)
    count = 0
    if level == IMAGES:
        for first in range(0, layer.batch, size):
            images = min(size, layer.batch - first)
            positions[count] = images * layer.out_d * layer.out_h * layer.out_w
            inputs[count] = images * all_d * all_h * all_w
            segments[count] = images
            count += 1
        return count
    if level == PLANES:
        for first in range(0, layer.out_d, size):
            last = min(first + size, layer.out_d) - 1
            lines = _covered(first, last, layer.stride_d, layer.reach_d, layer.pad_d, layer.in_d)
            positions[count] = (last + 1 - first) * layer.out_h * layer.out_w
            inputs[count] = lines * all_h * all_w
            segments[count] = 1
            count += 1
        return count
    for plane in range(layer.out_d):
        planes = _covered(plane, plane, layer.stride_d, layer.reach_d, layer.pad_d, layer.in_d)
        if level == ROWS:
            for first in range(0, layer.out_h, size):
                last = min(first + size, layer.out_h) - 1
                lines = _covered(first, last, layer.stride_h, layer.reach_h, layer.pad_h, layer.in_h)
                positions[count] = (last + 1 - first) * layer.out_w
                inputs[count] = planes * lines * all_w
                segments[count] = planes
                count += 1
        else:
            for row in range(layer.out_h):
                rows = _covered(row, row, layer.stride_h, layer.reach_h, layer.pad_h, layer.in_h)
                for first in range(0, layer.out_w, size):
                    last = min(first + size, layer.out_w) - 1
                    lines = _covered(first, last, layer.stride_w, layer.reach_w, layer.pad_w, layer.in_w)
                    positions[count] = last + 1 - first
                    inputs[count] = planes * rows * lines
                    segments[count] = planes * rows
                    count += 1
    return count


@compiled
def burst_bytes(payload: int, segments: int, burst: int) -> int:
    """Bytes that move for ``payload`` bytes in ``segments`` equal contiguous pieces, each in whole bursts."""
    if payload == 0:
        return 0
    segments = max(segments, 1)
    return segments * ceil_div(ceil_div(payload, segments), burst) * burst


@compiled
def channel_cycles(moved: int, rate: int) -> int:
    """Cycles that ``moved`` bytes occupy the channel, its latency apart."""
    return ceil_div(moved * RATE, rate)


@compiled
def map_bytes(elements: int, level: int, segments: int, channels: int, whole: bool, machine: Any) -> int:
    """Bytes moved for ``elements`` per channel of ``channels`` channels of a map; ``whole``: that is all its channels.

    Whole images lie in one piece, and all of them together if all channels move.
    """
    if level == IMAGES:
        pieces = 1 if whole else segments
    else:
        pieces = segments * ceil_div(channels, machine.columns)
    return burst_bytes(elements * channels * machine.data_bytes, pieces, machine.burst)


@compiled
def weight_piece_bytes(layer: Any, machine: Any, channels: int, filters: int, first: bool) -> int:
    """Bytes moved for the weights of one tile; the first tile along K brings the biases."""
    payload = channels * layer.taps * filters * machine.data_bytes
    if first and layer.bias:
        payload += filters * machine.accumulator_bytes
    return burst_bytes(payload, 1, machine.burst)


@compiled
def fits(
    layer: Any,
    machine: Any,
    pack: int,
    max_positions: int,
    max_inputs: int,
    position_count: int,
    tile_filters: int,
    tile_channels: int,
    order: int,
    hold_input: int,
    hold_weights: int,
) -> bool:
    """Whether the tiles find room. A held operand stays for all its uses, another one is loaded for each use.

    Positions first: a held input is one position tile with all its channels, held weights are all of them. Filters
    first: held weights are one filter tile with all its channels, a held input is the whole map. Whatever changes
    during the layer has a second buffer on a double-buffered machine.
    """
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    filter_tiles, channel_tiles = ceil_div(filters, tile_filters), ceil_div(channels, tile_channels)
    output_tiles = position_count * filter_tiles * groups
    buffers = machine.buffers
    if min(buffers, output_tiles) * max_positions * tile_filters * machine.accumulator_bytes > (
        machine.accumulator_capacity
    ):
        return False
    bias = machine.accumulator_bytes if layer.bias else 0
    in_flight = min(buffers, output_tiles * channel_tiles)
    if layer.input_on_chip:
        inputs = 0
    elif not hold_input:
        inputs = in_flight * max_inputs * tile_channels
    elif order == POSITIONS_FIRST:
        inputs = min(buffers, position_count * groups) * max_inputs * channels
    else:
        inputs = min(buffers, groups) * layer.batch * layer.in_d * layer.in_h * layer.in_w * channels
    inputs = inputs * machine.data_bytes + layer.reserved_bytes
    if not hold_weights:
        weights = in_flight * tile_filters * (tile_channels * layer.taps * machine.data_bytes + bias)
    elif order == POSITIONS_FIRST:
        weights = min(buffers, groups) * filters * (channels * layer.taps * machine.data_bytes + bias)
    else:
        weights = (
            min(buffers, filter_tiles * groups) * tile_filters * (channels * layer.taps * machine.data_bytes + bias)
        )
    if machine.shared:
        return inputs + weights <= machine.input_bytes + machine.weight_bytes
    return inputs <= machine.input_bytes and weights <= machine.weight_bytes
