"""The best tiling of each layer: every candidate is bounded, the promising ones are run through the event model.

Candidates are tried in the order of their lower bounds until the next bound is above the best time found, so the
result is the exact minimum over all candidates: fewest cycles, then least DRAM traffic, then the first candidate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div, gemm_accumulator_writes, gemm_input_reads, gemm_weight_reads
from accel_sim.pricing.candidate import (
    PRICE,
    TOTALS,
    bound_cycles,
    fill_steps,
    loads_fresh,
    sum_tiles,
)
from accel_sim.pricing.candidates import list_candidates
from accel_sim.pricing.pieces import MOST_WIDTHS, input_sum, piece_widths
from accel_sim.pricing.pipeline import pipeline_cycles
from accel_sim.pricing.tiling import IMAGES, MAX_TILES_PER_IMAGE, merge_tiles, position_tiles
from accel_sim.row_stationary.search import best_mappings


@compiled
def _count_accesses(
    layer: Any, machine: Any, price: Any, kinds: int, positions: NDArray[np.int64], times: NDArray[np.int64]
) -> None:
    """Fills ``price``'s scratchpad and accumulator traffic: what the array reads, what the DMA and the array write."""
    channels, filters, groups = layer.channels * price.pack, layer.filters * price.pack, layer.groups // price.pack
    repeats = 1 if price.level == IMAGES else layer.batch
    filter_tiles, channel_tiles = ceil_div(filters, price.tile_filters), ceil_div(channels, price.tile_channels)
    n_last = filters - (filter_tiles - 1) * price.tile_filters
    c_last = channels - (channel_tiles - 1) * price.tile_channels
    rows, columns, dataflow = machine.rows, machine.columns, price.dataflow
    reads = 0
    partial_sums = 0
    results = 0
    for i in range(kinds):
        m = positions[i]
        results += times[i] * m * filters
        for part in range(4):
            n = n_last if part % 2 else price.tile_filters
            k = (c_last if part // 2 else price.tile_channels) * layer.taps
            tiles = times[i] * (1 if part % 2 else filter_tiles - 1) * (1 if part // 2 else channel_tiles - 1)
            reads += tiles * gemm_input_reads(dataflow, rows, columns, m, k, n)
            reads += tiles * gemm_weight_reads(dataflow, rows, columns, m, k, n)
            partial_sums += tiles * gemm_accumulator_writes(dataflow, rows, columns, m, k, n)
    scale = repeats * groups
    price.scratchpad_read_bytes = reads * scale * machine.data_bytes
    price.scratchpad_write_bytes = price.input_bytes + price.weight_bytes
    if layer.output_on_chip:
        price.scratchpad_write_bytes += results * scale * machine.data_bytes
    # Each partial sum but the first is added to the one before, and the last is read to be stored; a residual is
    # written as it comes, and read with the results.
    price.accumulator_write_bytes = partial_sums * scale * machine.accumulator_bytes
    if layer.residual:
        price.accumulator_write_bytes += results * scale * machine.data_bytes
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
def _search_each(
    layers: NDArray[Any],
    machines: NDArray[Any],
    prices: NDArray[Any],
    begin: int,
    tile_scratch: NDArray[np.int64],
    candidates: NDArray[Any],
    bounds: NDArray[np.int64],
) -> int:
    """Prices the layers from ``begin`` on; gives the one for which ``candidates`` has not room enough, or the end."""
    machine = machines[0]
    positions, inputs, segments, times = tile_scratch[0], tile_scratch[1], tile_scratch[2], tile_scratch[3]
    for at in range(begin, layers.size):
        layer = layers[at]
        found = list_candidates(layer, machine, positions, inputs, segments, times, candidates, bounds)
        if found < 0:
            return at
        winner = -1
        fewest = 0
        least = 0
        for _ in range(found):
            pick = -1
            for i in range(found):
                if bounds[i] >= 0 and (pick < 0 or bounds[i] < bounds[pick]):
                    pick = i
            if winner >= 0 and bounds[pick] > fewest:
                break
            bounds[pick] = -1
            price = candidates[pick]
            moved = price.input_bytes + price.weight_bytes + price.residual_bytes + price.output_bytes
            count = position_tiles(layer, price.level, price.tile_size, loads_fresh(price), positions, inputs, segments)
            cycles = _run(layer, machine, price, count, positions, inputs, segments)
            better = cycles < fewest or (cycles == fewest and moved < least)
            if winner < 0 or better or (cycles == fewest and moved == least and pick < winner):
                winner, fewest, least = pick, cycles, moved
        if winner < 0:
            prices[at].cycles = -1
            continue
        prices[at] = candidates[winner]
        price = prices[at]
        price.cycles = fewest
        count = position_tiles(layer, price.level, price.tile_size, 0, positions, inputs, segments)
        kinds = merge_tiles(count, positions, inputs, segments, times)
        _count_accesses(layer, machine, price, kinds, positions, times)
    return layers.size


@compiled
def _run_each(
    layers: NDArray[Any], machines: NDArray[Any], prices: NDArray[Any], tile_scratch: NDArray[np.int64]
) -> None:
    machine = machines[0]
    positions, inputs, segments, times = tile_scratch[0], tile_scratch[1], tile_scratch[2], tile_scratch[3]
    totals, widths = np.empty(1, TOTALS), np.empty((2, MOST_WIDTHS), np.int64)
    for i in range(layers.size):
        layer, price = layers[i], prices[i]
        fresh = loads_fresh(price)
        count = position_tiles(layer, price.level, price.tile_size, fresh, positions, inputs, segments)
        images = 1 if price.level == IMAGES else layer.batch
        kinds = merge_tiles(count, positions, inputs, segments, times)
        found = piece_widths(layer, machine, price.pack, price.tile_channels, price.hold_input, widths)
        once = images * input_sum(layer, machine, found, widths, kinds, inputs, segments, times)
        sum_tiles(layer, machine, price, kinds, positions, inputs, segments, times, totals[0])
        bound_cycles(layer, machine, price, count * images, once, totals[0])
        _count_accesses(layer, machine, price, kinds, positions, times)
        count = position_tiles(layer, price.level, price.tile_size, fresh, positions, inputs, segments)
        price.cycles = _run(layer, machine, price, count, positions, inputs, segments)


def _tile_scratch(layers: NDArray[Any]) -> NDArray[np.int64]:
    """Room for the tiles of the largest layer: single positions of an image, or images."""
    per_image = layers["out_d"] * layers["out_h"] * layers["out_w"]
    room = max(np.minimum(per_image, MAX_TILES_PER_IMAGE).max(initial=1), layers["batch"].max(initial=1))
    return np.empty((4, int(room)), np.int64)


def price_layers(layers: NDArray[Any], machine: NDArray[Any]) -> NDArray[Any]:
    """The best price of each layer, shape (len(layers),) of :data:`PRICE`; equal layers are searched once.

    ``layers`` is an array of :data:`accel_sim.pricing.layer.LAYER`, ``machine`` a
    :func:`accel_sim.pricing.machine.machine_record`. ``cycles`` -1: no tiling fits. On a row-stationary machine the
    prices are those of the best mappings.
    """
    seen: dict[bytes, int] = {}
    where = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in layers], dtype=np.intp)
    distinct = np.frombuffer(b"".join(seen), dtype=layers.dtype).copy()
    if machine[0]["rs"]:
        return best_mappings(distinct, machine)[0][where]
    prices = np.zeros(len(seen), PRICE)
    scratch = _tile_scratch(distinct)
    room, done = 4096, 0
    while True:
        candidates, bounds = np.empty(room, PRICE), np.empty(room, np.int64)
        done = _search_each(distinct, machine, prices, done, scratch, candidates, bounds)
        if done == len(distinct):
            return prices[where]
        room *= 4


def price_tilings(layers: NDArray[Any], machine: NDArray[Any], tilings: NDArray[Any]) -> NDArray[Any]:
    """Prices of given tilings, without a search: row i of ``tilings`` (:data:`PRICE`) names the one of layer i.

    Only the columns of the tiling are read; whether it fits is not checked. Gives a new array. ValueError for a
    row-stationary machine, which has mappings (:mod:`accel_sim.row_stationary.search`).
    """
    if machine[0]["rs"]:
        raise ValueError("a row-stationary array has mappings, no tilings: use price_mappings")
    prices = tilings.copy()
    _run_each(layers, machine, prices, _tile_scratch(layers))
    return prices
