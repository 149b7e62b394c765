"""How a layer is cut into tiles: the candidates, and what each of them moves.

Output positions are cut along one axis - images, or depth, rows, or columns of a single image, whichever level comes
first that is small enough; filters in multiples of the array's columns; input channels in multiples of its rows. The
grids depend on layer and array alone, never on memory sizes, so that a machine with more memory has every candidate
of the smaller one and can only be faster.

Activations lie in DRAM in blocks of as many channels as the array has columns, weights in the order in which they
are loaded. An input is loaded in whole blocks, and whole along the axes inside the one that is cut: a piece of a map
that is not whole in height is one contiguous segment per channel block and plane. Results leave in the channels that a
tile has; where these are no whole blocks, as between the groups of a grouped convolution, a position is a piece.
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

MAX_TILES_PER_IMAGE = 1 << 16


@compiled
def split_sizes(layer: Any, level: int, sizes: NDArray[np.int64]) -> int:
    """Writes the tile sizes worth trying at ``level`` into ``sizes``, largest first; gives their number.

    The axis is split into 1, 2, 3, 4, 6, 8, 12, ... parts (columns: powers of two). A whole axis is the next level's
    single position and is left out, but for the images.
    """
    total = layer.batch
    if level != IMAGES:
        total = layer.out_d if level == PLANES else (layer.out_h if level == ROWS else layer.out_w)
    count = 0
    parts = 1 if level == IMAGES else 2
    while True:
        size = ceil_div(total, parts)
        if (size < total or level == IMAGES) and (count == 0 or size < sizes[count - 1]):
            sizes[count] = size
            count += 1
        if parts >= total:
            return count
        if level == COLUMNS or parts == 1:
            parts *= 2
        else:  # a power of two, or three times one
            parts = parts * 3 // 2 if parts & (parts - 1) == 0 else parts // 3 * 4


@compiled
def multiples(total: int, unit: int, smaller: int, sizes: NDArray[np.int64]) -> int:
    """Writes ``smaller`` (if 0 < smaller < unit), ``unit`` times powers of two, and ``total``; gives their number."""
    count = 0
    if 0 < smaller < min(unit, total):
        sizes[0] = smaller
        count = 1
    size = unit
    while size < total:
        sizes[count] = size
        count += 1
        size *= 2
    sizes[count] = total
    return count + 1


@compiled
def _covered(first: int, last: int, stride: int, reach: int, pad: int, size: int) -> int:
    """How many input lines the output lines ``first`` .. ``last`` read; padding is not loaded."""
    begin = max(first * stride - pad, 0)
    end = min(last * stride - pad + reach, size)
    return max(end - begin, 0)


@compiled
def _fresh(first: int, last: int, stride: int, reach: int, pad: int, size: int) -> int:
    """As :func:`_covered`, without the lines that output lines before ``first`` have read."""
    begin = first * stride - pad
    if first > 0:
        begin = max(begin, (first - 1) * stride - pad + reach)
    return max(min(last * stride - pad + reach, size) - max(begin, 0), 0)


@compiled
def _lines(fresh: int, first: int, last: int, stride: int, reach: int, pad: int, size: int) -> int:
    if fresh:
        return int(_fresh(first, last, stride, reach, pad, size))
    return int(_covered(first, last, stride, reach, pad, size))


@compiled
def position_tile_count(layer: Any, level: int, size: int) -> int:
    """Tiles per image (level :data:`IMAGES`: in all)."""
    if level == IMAGES:
        return ceil_div(layer.batch, size)
    if level == PLANES:
        return ceil_div(layer.out_d, size)
    if level == ROWS:
        return int(layer.out_d * ceil_div(layer.out_h, size))
    return int(layer.out_d * layer.out_h * ceil_div(layer.out_w, size))


@compiled
def position_tiles(
    layer: Any,
    level: int,
    size: int,
    fresh: int,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
) -> int:
    """Cuts the positions into tiles of ``size`` along ``level``; gives the number of tiles per image (or in all).

    Per tile: output positions; input elements per channel, halo included; contiguous segments per channel block.
    ``fresh``: only input lines that no tile before has read, of a map that stays.
    """
    plane = layer.in_h * layer.in_w
    count = 0
    if level == IMAGES:
        for first in range(0, layer.batch, size):
            images = min(size, layer.batch - first)
            positions[count] = images * layer.out_d * layer.out_h * layer.out_w
            inputs[count] = images * layer.in_d * plane
            segments[count] = images
            count += 1
        return count
    if level == PLANES:
        for first in range(0, layer.out_d, size):
            last = min(first + size, layer.out_d) - 1
            planes = _lines(fresh, first, last, layer.stride_d, layer.reach_d, layer.pad_d, layer.in_d)
            positions[count] = (last + 1 - first) * layer.out_h * layer.out_w
            inputs[count] = planes * plane
            segments[count] = 1
            count += 1
        return count
    for out_plane in range(layer.out_d):
        planes = _lines(fresh, out_plane, out_plane, layer.stride_d, layer.reach_d, layer.pad_d, layer.in_d)
        if level == ROWS:
            for first in range(0, layer.out_h, size):
                last = min(first + size, layer.out_h) - 1
                rows = _lines(fresh, first, last, layer.stride_h, layer.reach_h, layer.pad_h, layer.in_h)
                positions[count] = (last + 1 - first) * layer.out_w
                inputs[count] = planes * rows * layer.in_w
                segments[count] = 1 if rows == layer.in_h else planes
                count += 1
        else:
            for row in range(layer.out_h):
                rows = _lines(fresh, row, row, layer.stride_h, layer.reach_h, layer.pad_h, layer.in_h)
                for first in range(0, layer.out_w, size):
                    last = min(first + size, layer.out_w) - 1
                    run = _lines(fresh, first, last, layer.stride_w, layer.reach_w, layer.pad_w, layer.in_w)
                    positions[count] = last + 1 - first
                    inputs[count] = planes * rows * run
                    segments[count] = planes * rows
                    if run == layer.in_w:
                        segments[count] = 1 if rows == layer.in_h else planes
                    count += 1
    return count


@compiled
def merge_tiles(
    count: int,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
    times: NDArray[np.int64],
) -> int:
    """Merges equal neighbours of :func:`position_tiles` in place, ``times`` saying how many; gives what is left."""
    kinds = 0
    times[0] = 1
    for i in range(1, count):
        if positions[i] == positions[kinds] and inputs[i] == inputs[kinds] and segments[i] == segments[kinds]:
            times[kinds] += 1
            continue
        kinds += 1
        positions[kinds], inputs[kinds], segments[kinds] = positions[i], inputs[i], segments[i]
        times[kinds] = 1
    return kinds + 1


@compiled
def burst_bytes(payload: int, burst: int) -> int:
    """Bytes that move for one contiguous piece of ``payload`` bytes: whole bursts."""
    return ceil_div(payload, burst) * burst


@compiled
def channel_cycles(moved: int, rate: int) -> int:
    """Cycles that ``moved`` bytes occupy the channel, its latency apart."""
    return ceil_div(moved * RATE, rate)


@compiled
def map_bytes(elements: int, segments: int, size: int, channels: int, whole: bool, machine: Any) -> int:
    """Bytes moved for ``elements`` per channel of ``channels`` channels, whole blocks of a map of ``size`` positions.

    ``segments`` equal runs of positions make up the elements. Whole images lie in one piece each, and all of them
    together if all channels move (``whole``); of anything less, each run is a piece per channel block.
    """
    if elements == 0 or channels <= 0:
        return 0
    if elements == segments * size and whole:
        return burst_bytes(elements * channels * machine.data_bytes, machine.burst)
    run_bytes = elements // segments * machine.data_bytes
    if elements == segments * size:
        return int(segments * burst_bytes(run_bytes * channels, machine.burst))
    blocks = channels // machine.columns
    moved = blocks * burst_bytes(run_bytes * machine.columns, machine.burst)
    return int(segments * (moved + burst_bytes(run_bytes * (channels - blocks * machine.columns), machine.burst)))


@compiled
def input_piece(
    layer: Any, columns: int, pack: int, tile_channels: int, held: int, group: int, piece: int
) -> tuple[int, int]:
    """First and last (exclusive) channel, in the whole map, of the blocks that tile ``piece`` along K loads.

    ``group`` counts packs of groups. ``held``: blocks that the pieces before it brought stay, and are left out.
    """
    channels = layer.channels * pack
    begin = group * channels + piece * tile_channels
    end = min(begin + tile_channels, (group + 1) * channels)
    first = begin // columns * columns
    if held and piece > 0:
        first = ceil_div(begin, columns) * columns
    last = min(ceil_div(end, columns) * columns, layer.channels * layer.groups)
    return first, max(first, last)


@compiled
def input_aligned(layer: Any, columns: int, pack: int, tile_channels: int) -> bool:
    """Whether all tiles along K begin with a block, so that those of all groups are alike."""
    channels = layer.channels * pack
    groups_aligned = pack == layer.groups or channels % columns == 0
    return bool(groups_aligned and (tile_channels >= channels or tile_channels % columns == 0))


@compiled
def output_aligned(layer: Any, columns: int, pack: int) -> bool:
    """Whether the results of each group are whole blocks of the output."""
    return bool(pack == layer.groups or layer.filters * pack % columns == 0)


@compiled
def split_blocks(first: int, filters: int, total: int, elements: int, segments: int, machine: Any) -> tuple[int, int]:
    """(parts, bytes moved) of ``filters`` channels from ``first`` on, of a map of ``total`` channels.

    A part is what a block of the tile and a block of the map have in common. A part that is a whole block of the map
    is contiguous over each segment; of any other, each position is a piece.
    """
    columns = machine.columns
    parts = 0
    moved = 0
    at = first
    while at < first + filters:
        block = at // columns * columns
        width = min(columns, total - block)
        tile_end = min(first + ((at - first) // columns + 1) * columns, first + filters)
        end = min(block + columns, tile_end)
        if end - at == width:
            moved += segments * burst_bytes(elements // segments * width * machine.data_bytes, machine.burst)
        else:
            moved += elements * burst_bytes((end - at) * machine.data_bytes, machine.burst)
        parts += 1
        at = end
    return parts, moved


@compiled
def weight_piece_bytes(layer: Any, machine: Any, channels: int, filters: int, bias: int) -> int:
    """Bytes moved for the weights of one tile; ``bias`` 1 for the first tile along K, which brings the biases."""
    payload = channels * layer.taps * filters * machine.data_bytes
    if bias:
        payload += filters * machine.accumulator_bytes
    return burst_bytes(payload, machine.burst)
