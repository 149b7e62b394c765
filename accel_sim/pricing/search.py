"""The best tiling of each layer: every candidate is bounded, the promising ones are run through the event model.

Candidates are tried in the order of their lower bounds until the next bound is above the best time found, so the
result is the exact minimum over all candidates: fewest cycles, then least DRAM traffic, then the first candidate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import (
    INPUT_STATIONARY,
    OUTPUT_STATIONARY,
    WEIGHT_STATIONARY,
    ceil_div,
    gemm_accumulator_writes,
    gemm_input_reads,
    gemm_weight_reads,
)
from accel_sim.pricing.candidate import PRICE, bound_cycles, fill_steps, input_sum
from accel_sim.pricing.pipeline import pipeline_cycles
from accel_sim.pricing.tiling import (
    COLUMNS,
    FILTERS_FIRST,
    IMAGES,
    MAX_TILES_PER_IMAGE,
    PLANES,
    POSITIONS_FIRST,
    ROWS,
    fits,
    multiples,
    position_tile_count,
    position_tiles,
    split_sizes,
)

_GRID = 64
"""Room for the sizes of one axis; the grids grow with the logarithm of the axis."""


@compiled
def _packs(layer: Any, machine: Any, packs: NDArray[np.int64]) -> int:
    """How many groups to run as one block-diagonal GEMM: 1, and every divisor that needs fewer folds than all before.

    The zero blocks are weights like any other: they are loaded, and they occupy the array.
    """
    count = 0
    fewest = 0
    for pack in range(1, layer.groups + 1):
        if pack > 1 and (pack * layer.filters > machine.columns or count == packs.size):
            break
        if layer.groups % pack:
            continue
        folds = ceil_div(pack * layer.channels * layer.taps, machine.rows) * ceil_div(
            pack * layer.filters, machine.columns
        )
        folds *= layer.groups // pack
        if count == 0 or folds < fewest:
            packs[count] = pack
            fewest = folds
            count += 1
    return count


@compiled
def _count_accesses(layer: Any, machine: Any, price: Any, count: int, positions: NDArray[np.int64]) -> None:
    """Fills ``price``'s scratchpad and accumulator traffic: what the array reads, what the DMA and the array write."""
    channels, filters, groups = layer.channels * price.pack, layer.filters * price.pack, layer.groups // price.pack
    repeats = 1 if price.level == IMAGES else layer.batch
    filter_tiles, channel_tiles = ceil_div(filters, price.tile_filters), ceil_div(channels, price.tile_channels)
    n_last = filters - (filter_tiles - 1) * price.tile_filters
    c_last = channels - (channel_tiles - 1) * price.tile_channels
    reads = 0
    partial_sums = 0
    results = 0
    for i in range(count):
        m = positions[i]
        for f in range(2):
            n = n_last if f else price.tile_filters
            for c in range(2):
                k = (c_last if c else price.tile_channels) * layer.taps
                times = (1 if f else filter_tiles - 1) * (1 if c else channel_tiles - 1)
                if times == 0:
                    continue
                reads += times * gemm_input_reads(price.dataflow, machine.rows, machine.columns, m, k, n)
                reads += times * gemm_weight_reads(price.dataflow, machine.rows, machine.columns, m, k, n)
                partial_sums += times * gemm_accumulator_writes(price.dataflow, machine.rows, machine.columns, m, k, n)
        results += m * filters
    scale = repeats * groups
    price.scratchpad_read_bytes = reads * scale * machine.data_bytes
    price.scratchpad_write_bytes = price.input_bytes + price.weight_bytes
    if layer.output_on_chip:
        price.scratchpad_write_bytes += results * scale * machine.data_bytes
    # Each partial sum but the first is added to the one before, and the last is read to be stored.
    price.accumulator_write_bytes = partial_sums * scale * machine.accumulator_bytes
    price.accumulator_read_bytes = price.accumulator_write_bytes


@compiled
def _run(
    layer: Any,
    machine: Any,
    price: Any,
    count: int,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
) -> int:
    """Cycles of the tiling that ``price`` names, from the event model."""
    load = np.empty(price.steps, np.int64)
    compute = np.empty(price.steps, np.int64)
    store = np.empty(price.steps, np.int64)
    steps = fill_steps(layer, machine, price, count, positions, inputs, segments, load, compute, store)
    return pipeline_cycles(
        load, compute, store, steps, machine.buffers, machine.latency, machine.pipelined, 1 - layer.output_on_chip
    )


@compiled
def _grow(array: NDArray[Any]) -> NDArray[Any]:
    bigger = np.empty(array.size * 2, array.dtype)
    bigger[: array.size] = array
    return bigger


@compiled
def _search(layer: Any, machine: Any, scratch: NDArray[Any], best: NDArray[Any]) -> NDArray[Any]:
    """Writes the cheapest price into ``best[0]``; gives the scratch array, larger if it had to grow."""
    packs = np.empty(8, np.int64)
    sizes = np.empty(_GRID, np.int64)
    tile_filters = np.empty(_GRID, np.int64)
    tile_channels = np.empty(_GRID, np.int64)
    flows = np.empty(3, np.int64)
    flow_count = 0
    for flow, present in (
        (WEIGHT_STATIONARY, machine.ws),
        (OUTPUT_STATIONARY, machine.os),
        (INPUT_STATIONARY, machine.is_),
    ):
        if present:
            flows[flow_count] = flow
            flow_count += 1
    found = 0
    bounds = np.empty(scratch.size, np.int64)
    longest = max(layer.batch, 1)
    for level, size in ((PLANES, layer.out_d), (ROWS, layer.out_d * layer.out_h), (COLUMNS, layer.out_d * layer.out_h)):
        longest = max(longest, size * (layer.out_w if level == COLUMNS else 1))
    longest = min(longest, MAX_TILES_PER_IMAGE)
    positions = np.empty(longest, np.int64)
    inputs = np.empty(longest, np.int64)
    segments = np.empty(longest, np.int64)

    for at in range(_packs(layer, machine, packs)):
        pack = packs[at]
        channels, filters = layer.channels * pack, layer.filters * pack
        filter_sizes = multiples(filters, machine.columns, 0, False, tile_filters)
        channel_sizes = multiples(channels, machine.rows, machine.rows // layer.taps, True, tile_channels)
        for level in range(4):
            if level == IMAGES:
                size_count = split_sizes(layer.batch, sizes, True, False)
            elif level == PLANES:
                size_count = split_sizes(layer.out_d, sizes, False, False)
            elif level == ROWS:
                size_count = split_sizes(layer.out_h, sizes, False, False)
            else:
                size_count = split_sizes(layer.out_w, sizes, False, True)
            for s in range(size_count):
                if position_tile_count(layer, level, sizes[s]) > longest:
                    continue
                count = position_tiles(layer, level, sizes[s], positions, inputs, segments)
                most_positions = positions[0]
                most_inputs = 0
                for i in range(count):
                    most_inputs = max(most_inputs, inputs[i])
                tiles = count if level == IMAGES else count * layer.batch
                for ci in range(channel_sizes):
                    tc = tile_channels[ci]
                    once = -1
                    for fi in range(filter_sizes):
                        tn = tile_filters[fi]
                        for order in range(2):
                            if order == FILTERS_FIRST and (tiles == 1 or tn == filters):
                                continue  # one loop is empty: the same as positions first
                            both = fits(layer, machine, pack, most_positions, most_inputs, tiles, tn, tc, order, 1, 1)
                            alone = False
                            for hold in range(3):
                                # Holding an operand leaves transfers out: it is never slower where it fits.
                                hold_input, hold_weights = 1, 1
                                if hold == 0:
                                    if not both:
                                        continue
                                elif both:
                                    break
                                else:
                                    hold_input, hold_weights = 2 - hold, hold - 1
                                    if not fits(
                                        layer,
                                        machine,
                                        pack,
                                        most_positions,
                                        most_inputs,
                                        tiles,
                                        tn,
                                        tc,
                                        order,
                                        hold_input,
                                        hold_weights,
                                    ):
                                        if hold == 1 or alone:
                                            continue
                                        hold_weights = 0
                                        if not fits(
                                            layer,
                                            machine,
                                            pack,
                                            most_positions,
                                            most_inputs,
                                            tiles,
                                            tn,
                                            tc,
                                            order,
                                            0,
                                            0,
                                        ):
                                            continue
                                    alone = True
                                if once < 0:
                                    once = input_sum(layer, machine, pack, level, tc, count, inputs, segments)
                                for fl in range(flow_count):
                                    if found == scratch.size:
                                        scratch = _grow(scratch)
                                        bounds = _grow(bounds)
                                    price = scratch[found]
                                    price.dataflow = flows[fl]
                                    price.order = order
                                    price.level = level
                                    price.tile_size = sizes[s]
                                    price.tile_filters = tn
                                    price.tile_channels = tc
                                    price.pack = pack
                                    price.hold_input = hold_input
                                    price.hold_weights = hold_weights
                                    bounds[found] = bound_cycles(
                                        layer, machine, price, count, positions, inputs, segments, once
                                    )
                                    found += 1

    winner = -1
    fewest = np.int64(-1)
    least = 0
    for _ in range(found):
        pick = 0
        for i in range(found):
            if bounds[i] >= 0 and (bounds[pick] < 0 or bounds[i] < bounds[pick]):
                pick = i
        price = scratch[pick]
        if winner >= 0 and bounds[pick] > fewest:
            break
        bounds[pick] = -1
        moved = price.input_bytes + price.weight_bytes + price.output_bytes
        count = position_tiles(layer, price.level, price.tile_size, positions, inputs, segments)
        cycles = _run(layer, machine, price, count, positions, inputs, segments)
        if winner < 0 or (cycles, moved, pick) < (fewest, least, winner):
            winner, fewest, least = pick, cycles, moved
    if winner < 0:
        best[0].cycles = -1
        return scratch
    best[0] = scratch[winner]
    price = best[0]
    price.cycles = fewest
    count = position_tiles(layer, price.level, price.tile_size, positions, inputs, segments)
    _count_accesses(layer, machine, price, count, positions)
    return scratch


@compiled
def _search_each(layers: NDArray[Any], machine: NDArray[Any], prices: NDArray[Any]) -> None:
    scratch = np.empty(512, prices.dtype)
    for i in range(layers.size):
        scratch = _search(layers[i], machine[0], scratch, prices[i : i + 1])


@compiled
def _run_each(layers: NDArray[Any], machine: NDArray[Any], prices: NDArray[Any]) -> None:
    for i in range(layers.size):
        layer, price = layers[i], prices[i]
        longest = max(position_tile_count(layer, price.level, price.tile_size), 1)
        positions = np.empty(longest, np.int64)
        inputs = np.empty(longest, np.int64)
        segments = np.empty(longest, np.int64)
        count = position_tiles(layer, price.level, price.tile_size, positions, inputs, segments)
        once = input_sum(layer, machine[0], price.pack, price.level, price.tile_channels, count, inputs, segments)
        bound_cycles(layer, machine[0], price, count, positions, inputs, segments, once)
        price.cycles = _run(layer, machine[0], price, count, positions, inputs, segments)
        _count_accesses(layer, machine[0], price, count, positions)


def price_layers(layers: NDArray[Any], machine: NDArray[Any]) -> NDArray[Any]:
    """The best price of each layer, shape (len(layers),) of :data:`PRICE`; equal layers are searched once.

    ``layers`` is an array of :data:`accel_sim.pricing.layer.LAYER`, ``machine`` a
    :func:`accel_sim.pricing.machine.machine_record`. ``cycles`` -1: no tiling fits.
    """
    seen: dict[bytes, int] = {}
    where = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in layers], dtype=np.intp)
    first = np.full(len(seen), -1, dtype=np.intp)
    for i, slot in enumerate(where):
        if first[slot] < 0:
            first[slot] = i
    prices = np.zeros(len(seen), PRICE)
    _search_each(np.ascontiguousarray(layers[first]), machine, prices)
    return prices[where]


def price_tilings(layers: NDArray[Any], machine: NDArray[Any], tilings: NDArray[Any]) -> NDArray[Any]:
    """Prices of given tilings, without a search: row i of ``tilings`` (:data:`PRICE`) names the one of layer i.

    Only the columns of the tiling are read; whether it fits is not checked. Gives a new array.
    """
    prices = tilings.copy()
    _run_each(layers, machine, prices)
    return prices
