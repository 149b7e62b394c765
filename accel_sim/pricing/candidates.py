"""The tilings of a layer that are worth pricing.

The grids depend on layer and array alone; memories only rule candidates out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import INPUT_STATIONARY, OUTPUT_STATIONARY, WEIGHT_STATIONARY, ceil_div
from accel_sim.pricing.candidate import FILTERS_FIRST, bound_cycles, fits, input_sum
from accel_sim.pricing.tiling import (
    IMAGES,
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
    found = 0
    for at in range(_packs(layer, machine, packs)):
        pack = packs[at]
        filters = layer.filters * pack
        filter_sizes = multiples(filters, machine.columns, machine.columns, tile_filters)
        channel_sizes = multiples(layer.channels * pack, machine.rows, machine.rows // layer.taps, tile_channels)
        for level in range(_LEVELS):
            for s in range(split_sizes(layer, level, sizes)):
                if position_tile_count(layer, level, sizes[s]) > positions.size:
                    continue
                count = position_tiles(layer, level, sizes[s], positions, inputs, segments)
                most_inputs = inputs[0]
                for i in range(count):
                    most_inputs = max(most_inputs, inputs[i])
                tiles = count if level == IMAGES else count * layer.batch
                for ci in range(channel_sizes):
                    once = input_sum(layer, machine, pack, level, tile_channels[ci], count, inputs, segments)
                    for fi in range(filter_sizes):
                        for order in range(2):
                            if order == FILTERS_FIRST and (tiles == 1 or tile_filters[fi] == filters):
                                continue  # one loop is empty: the same as positions first
                            taken = False
                            # Hold both operands, the input, the weights, neither. Holding leaves transfers out, so
                            # it is never slower where it fits, and less of it need not be tried.
                            for hold in range(4):
                                if hold == 3 and taken:
                                    break
                                first = found
                                if found + INPUT_STATIONARY >= prices.size:
                                    return -1
                                for dataflow in range(INPUT_STATIONARY + 1):
                                    if not _runs(machine, dataflow):
                                        continue
                                    price = prices[found]
                                    price.dataflow = dataflow
                                    price.order = order
                                    price.level = level
                                    price.tile_size = sizes[s]
                                    price.tile_filters = tile_filters[fi]
                                    price.tile_channels = tile_channels[ci]
                                    price.pack = pack
                                    price.hold_input = 1 if hold < 2 else 0
                                    price.hold_weights = 1 if hold % 2 == 0 else 0
                                    if found == first and not fits(
                                        layer, machine, price, positions[0], most_inputs, tiles
                                    ):
                                        break
                                    bounds[found] = bound_cycles(
                                        layer, machine, price, count, positions, inputs, segments, once
                                    )
                                    found += 1
                                taken = taken or found > first
                                if hold == 0 and taken:
                                    break
    return found
