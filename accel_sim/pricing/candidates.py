"""The tilings of a layer that are worth pricing.

The grids depend on layer and array alone; memories only rule candidates out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import INPUT_STATIONARY, OUTPUT_STATIONARY, WEIGHT_STATIONARY, ceil_div
from accel_sim.pricing.candidate import (
    FILTERS_FIRST,
    TOTALS,
    bound_cycles,
    fits,
    sum_tiles,
)
from accel_sim.pricing.pieces import LANES, MOST_WIDTHS, count_lanes, input_sum, piece_widths
from accel_sim.pricing.tiling import (
    IMAGES,
    input_aligned,
    merge_tiles,
    multiples,
    position_tile_count,
    position_tiles,
    split_sizes,
)

_GRID = 64
"""Room for the sizes of one axis; the grids grow with the logarithm of the axis."""

_PACKS = 8
_LEVELS = 4


@compiled
def _packs(layer: Any, machine: Any, packs: NDArray[np.int64]) -> int:
    """How many groups to run as one block-diagonal GEMM: 1, and every divisor that needs fewer folds than all before.

    The zero blocks are weights like any other: they are loaded, and they occupy the array.
    """
    count = 0
    fewest = 0
    for pack in range(1, layer.groups + 1):
        if count == packs.size or (pack > 1 and pack * layer.filters > machine.columns):
            break
        if layer.groups % pack == 0:
            folds = ceil_div(pack * layer.channels * layer.taps, machine.rows) * (layer.groups // pack)
            folds *= ceil_div(pack * layer.filters, machine.columns)
            if count == 0 or folds < fewest:
                packs[count] = pack
                fewest = folds
                count += 1
    return count


@compiled
def _runs(machine: Any, dataflow: int) -> bool:
    if dataflow == WEIGHT_STATIONARY:
        return bool(machine.ws)
    return bool(machine.os) if dataflow == OUTPUT_STATIONARY else bool(machine.is_)


@compiled
def list_candidates(
    layer: Any,
    machine: Any,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
    times: NDArray[np.int64],
    prices: NDArray[Any],
    bounds: NDArray[np.int64],
) -> int:
    """Writes every tiling that fits into ``prices``, a lower bound of its cycles into ``bounds``; gives the number.

    -1: ``prices`` has not room enough.
    """
    packs = np.empty(_PACKS, np.int64)
    sizes = np.empty(_GRID, np.int64)
    tile_filters = np.empty(_GRID, np.int64)
    tile_channels = np.empty(_GRID, np.int64)
    totals = np.empty(INPUT_STATIONARY + 1, TOTALS)
    lanes = np.empty(_GRID, LANES)
    widths, width_counts = np.empty((_GRID, 2, 2, MOST_WIDTHS), np.int64), np.empty((_GRID, 2), np.int64)
    fresh = np.empty((4, positions.size), np.int64)
    found = 0
    for at in range(_packs(layer, machine, packs)):
        pack = packs[at]
        filters = layer.filters * pack
        filter_sizes = multiples(filters, machine.columns, machine.columns, tile_filters)
        channel_sizes = multiples(layer.channels * pack, machine.rows, machine.rows // layer.taps, tile_channels)
        for ci in range(channel_sizes):
            count_lanes(layer, machine, pack, tile_channels[ci], lanes[ci])
            for held in range(2):
                width_counts[ci, held] = piece_widths(layer, machine, pack, tile_channels[ci], held, widths[ci, held])
        whole_map = layer.batch * layer.in_d * layer.in_h * layer.in_w * lanes[0].held * machine.data_bytes
        room = machine.input_bytes + (machine.weight_bytes if machine.shared else 0)
        map_fits = not layer.input_on_chip and whole_map + layer.reserved_bytes <= room
        for level in range(_LEVELS):
            for s in range(split_sizes(layer, level, sizes)):
                if position_tile_count(layer, level, sizes[s]) > positions.size:
                    continue
                count = position_tiles(layer, level, sizes[s], 0, positions, inputs, segments)
                images = 1 if level == IMAGES else layer.batch
                tiles = count * images
                kinds = merge_tiles(count, positions, inputs, segments, times)
                fresh_kinds = 0
                if tiles > 1 and filters > tile_filters[0] and map_fits:
                    position_tiles(layer, level, sizes[s], 1, fresh[0], fresh[1], fresh[2])
                    fresh_kinds = merge_tiles(count, fresh[0], fresh[1], fresh[2], fresh[3])
                most_inputs = inputs[0]
                for i in range(kinds):
                    most_inputs = max(most_inputs, inputs[i])
                for ci in range(channel_sizes):
                    tc = tile_channels[ci]
                    count, tile_widths = width_counts[ci, 0], widths[ci, 0]
                    once = images * input_sum(layer, machine, count, tile_widths, kinds, inputs, segments, times)
                    held, fresh_once = once, 0
                    count, tile_widths = width_counts[ci, 1], widths[ci, 1]
                    if not input_aligned(layer, machine.columns, pack, tc):
                        held = images * input_sum(layer, machine, count, tile_widths, kinds, inputs, segments, times)
                    if fresh_kinds:
                        fresh_once = images * input_sum(
                            layer, machine, count, tile_widths, fresh_kinds, fresh[1], fresh[2], fresh[3]
                        )
                    for fi in range(filter_sizes):
                        if found + 2 * 2 * (INPUT_STATIONARY + 1) > prices.size:
                            return -1
                        price = prices[found]
                        price.level, price.tile_size, price.pack = level, sizes[s], pack
                        price.tile_filters, price.tile_channels = tile_filters[fi], tc
                        price.hold_input = price.hold_weights = 0
                        if not fits(layer, machine, price, positions[0], most_inputs, tiles, lanes[ci]):
                            continue  # to hold anything takes more room
                        for dataflow in range(INPUT_STATIONARY + 1):
                            if _runs(machine, dataflow):
                                price.dataflow = dataflow
                                sum_tiles(
                                    layer, machine, price, kinds, positions, inputs, segments, times, totals[dataflow]
                                )
                        # With one loop empty, filters first is the same as positions first.
                        one_loop = tiles == 1 or tile_filters[fi] == filters
                        for order in range(1 if one_loop else FILTERS_FIRST + 1):
                            taken = False
                            # Hold both operands, the input, the weights, neither. Holding leaves transfers out, so
                            # it is never slower where it fits, and less of it need not be tried.
                            for hold in range(4):
                                if hold == 3 and taken:
                                    break
                                first = found
                                for dataflow in range(INPUT_STATIONARY + 1):
                                    if not _runs(machine, dataflow):
                                        continue
                                    price = prices[found]
                                    price.dataflow, price.order = dataflow, order
                                    price.level, price.tile_size, price.pack = level, sizes[s], pack
                                    price.tile_filters, price.tile_channels = tile_filters[fi], tc
                                    price.hold_input = 1 if hold < 2 else 0
                                    price.hold_weights = 1 if hold % 2 == 0 else 0
                                    if (hold < 3 and found == first) and not fits(
                                        layer, machine, price, positions[0], most_inputs, tiles, lanes[ci]
                                    ):
                                        break
                                    loaded = once
                                    if price.hold_input:
                                        loaded = fresh_once if order == FILTERS_FIRST else held
                                    bounds[found] = bound_cycles(layer, machine, price, tiles, loaded, totals[dataflow])
                                    found += 1
                                taken = taken or found > first
                                if hold == 0 and taken:
                                    break
    return found
