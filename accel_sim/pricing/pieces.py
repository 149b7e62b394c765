"""What the tiles along K load of the input: channels in whole blocks, and how many of them wait on chip together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div
from accel_sim.pricing.tiling import input_aligned, input_piece, map_bytes

LANES = np.dtype([(name, np.int64) for name in ("first", "second", "most", "held")])
"""Channels of input, in whole blocks, that the tiles along K take on chip: the largest first and second tile of any
group, the largest of all; and all those of a group together."""


_WIDTHS = 8


MOST_WIDTHS = 16


@compiled
def count_lanes(layer: Any, machine: Any, pack: int, tile_channels: int, lanes: Any) -> None:
    """Fills ``lanes`` (:data:`LANES`)."""
    channels = layer.channels * pack
    pieces = ceil_div(channels, tile_channels)
    groups = layer.groups // pack
    lanes.first = lanes.second = lanes.most = lanes.held = 0
    if pack == layer.groups or channels % machine.columns == 0:
        groups = 1
    for group in range(groups):
        begin = input_piece(layer, machine.columns, pack, tile_channels, 0, group, 0)[0]
        end = input_piece(layer, machine.columns, pack, tile_channels, 0, group, pieces - 1)[1]
        lanes.held = max(lanes.held, end - begin)
        for piece in range(pieces):
            first, last = input_piece(layer, machine.columns, pack, tile_channels, 0, group, piece)
            lanes.most = max(lanes.most, last - first)
            if piece == 0:
                lanes.first = max(lanes.first, last - first)
            elif piece == 1:
                lanes.second = max(lanes.second, last - first)


@compiled
def piece_widths(layer: Any, machine: Any, pack: int, tile_channels: int, held: int, widths: NDArray[np.int64]) -> int:
    """Writes how many channels the tiles along K of all groups load into row 0 of ``widths``, and how often into row 1;
    each number of channels once. Gives their number, at most :data:`MOST_WIDTHS`.

    Tiles differ by where they lie in their blocks, by being the last, and by the narrower last block of the map.
    """
    channels = layer.channels * pack
    groups, pieces = layer.groups // pack, ceil_div(channels, tile_channels)
    alike = input_aligned(layer, machine.columns, pack, tile_channels)
    count = 0
    for group in range(1 if alike else groups):
        for piece in range(0, pieces, max(pieces - 1, 1) if alike else 1):
            first, last = input_piece(layer, machine.columns, pack, tile_channels, held, group, piece)
            at = 0
            while at < count and widths[0, at] != last - first:
                at += 1
            if at == count:
                widths[0, at], widths[1, at] = last - first, 0
                count += 1
            widths[1, at] += (pieces - 1 if piece == 0 and pieces > 1 else 1) * groups if alike else 1
    return count


@compiled
def input_sum(
    layer: Any,
    machine: Any,
    count: int,
    widths: NDArray[np.int64],
    kinds: int,
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
    times: NDArray[np.int64],
) -> int:
    """Bytes moved to load every input tile of all groups once, of one image (or all, level IMAGES); tiles merged.

    ``widths`` are those of :func:`piece_widths`.
    """
    if layer.input_on_chip:
        return 0
    size, total = layer.in_d * layer.in_h * layer.in_w, layer.channels * layer.groups
    moved = 0
    for at in range(count):
        width = widths[0, at]
        for i in range(kinds):
            moved += widths[1, at] * times[i] * map_bytes(inputs[i], segments[i], size, width, width == total, machine)
    return moved
