"""One tiling of one layer: what it moves in all, a lower bound of its cycles, and its steps for the event model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div, gemm_cycles
from accel_sim.pricing.tiling import (
    IMAGES,
    channel_cycles,
    input_aligned,
    input_piece,
    map_bytes,
    output_aligned,
    split_blocks,
    weight_piece_bytes,
)

POSITIONS_FIRST, FILTERS_FIRST = 0, 1
"""Order: the outer loop runs over position tiles (input stays) or over filter tiles (weights stay)."""

PRICE = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("cycles", "array_cycles", "channel_cycles"),
            *("input_bytes", "weight_bytes", "residual_bytes", "output_bytes"),
            *("scratchpad_read_bytes", "scratchpad_write_bytes"),
            *("accumulator_read_bytes", "accumulator_write_bytes", "steps"),
            *("dataflow", "order", "level", "tile_size", "tile_filters", "tile_channels", "pack"),
            *("hold_input", "hold_weights"),
        )
    ]
)
"""What a layer costs, and the tiling that costs it. ``cycles`` is -1 where no tiling fits the memories.

``array_cycles``: the array is busy; ``channel_cycles``: the DRAM channel is. The ``*_bytes`` to and from DRAM are
whole bursts. ``pack``: groups that share the array as one block-diagonal GEMM.
"""

TOTALS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("array_cycles", "output_bytes", "output_cycles", "weight_bytes"),
            *("first_bytes", "last_array_cycles", "last_output_cycles"),
        )
    ]
)
"""Sums over all tiles, each loaded once (array cycles and weights: of one group, the output: of all of them); what
the first step loads; how long the last one takes."""


@compiled
def fits(
    layer: Any, machine: Any, price: Any, max_positions: int, max_inputs: int, position_count: int, lanes: Any
) -> bool:
    """Whether the tiles find room. A held operand stays for all its uses, another one is loaded for each use.

    Positions first: a held input is one position tile with all its channels, held weights are all of them. Filters
    first: held weights are one filter tile with all its channels, a held input is the whole map. Whatever changes
    during the layer has a second buffer on a double-buffered machine.

    A residual waits as it is, in the data's width, beside the accumulators of its tile. The place of the tile two
    before is free by then, for its load follows the store that frees it through the same channel.
    """
    pack, tn, tc = price.pack, price.tile_filters, price.tile_channels
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    filter_tiles, channel_tiles = ceil_div(filters, tn), ceil_div(channels, tc)
    output_tiles = position_count * filter_tiles * groups
    buffers = machine.buffers
    accumulators = min(buffers, output_tiles) * max_positions * tn
    width = machine.accumulator_bytes + (machine.data_bytes if layer.residual else 0)
    if accumulators * width > machine.accumulator_capacity:
        return False
    bias = machine.accumulator_bytes if layer.bias else 0
    in_flight = min(buffers, output_tiles * channel_tiles)
    biases_in_flight = in_flight
    channels_in_flight = in_flight * tc
    if channel_tiles > 1:  # of two steps in a row, one begins a tile, and a pair of two pieces is the whole
        biases_in_flight = 1
        channels_in_flight = min(channels_in_flight, channels)
    if layer.input_on_chip:
        inputs = 0
    elif not price.hold_input:
        inputs = max_inputs * (
            lanes.first + lanes.second if in_flight == channel_tiles == 2 else in_flight * lanes.most
        )
    elif price.order == POSITIONS_FIRST:
        inputs = min(buffers, position_count * groups) * max_inputs * lanes.held
    else:
        inputs = min(buffers, groups) * layer.batch * layer.in_d * layer.in_h * layer.in_w * lanes.held
    inputs = inputs * machine.data_bytes + layer.reserved_bytes
    if not price.hold_weights:
        weights = tn * (channels_in_flight * layer.taps * machine.data_bytes + biases_in_flight * bias)
    elif price.order == POSITIONS_FIRST:
        weights = min(buffers, groups) * filters * (channels * layer.taps * machine.data_bytes + bias)
    else:
        held = min(buffers, filter_tiles * groups) * tn
        weights = held * (channels * layer.taps * machine.data_bytes + bias)
    if machine.shared:
        return bool(inputs + weights <= machine.input_bytes + machine.weight_bytes)
    return bool(inputs <= machine.input_bytes and weights <= machine.weight_bytes)


@compiled
def output_tile(
    layer: Any, machine: Any, price: Any, first: int, positions: int, images: int, filters: int
) -> tuple[int, int]:
    """(DRAM bytes, cycles) to take ``filters`` channels of a tile out of the accumulators; the map's from ``first`` on.

    Over the channel; or, into the scratchpad, a row of the array's width each cycle.
    """
    total, size = layer.filters * layer.groups, layer.out_d * layer.out_h * layer.out_w
    segments = images if price.level == IMAGES else 1
    if output_aligned(layer, machine.columns, price.pack) or size == 1:
        parts = ceil_div(filters, machine.columns)
        moved = map_bytes(positions, segments, size, filters, filters == total, machine)
        if layer.output_on_chip and first % machine.columns:
            parts = split_blocks(first, filters, total, positions, segments, machine)[0]
    else:
        parts, moved = split_blocks(first, filters, total, positions, segments, machine)
    if layer.output_on_chip:
        return 0, int(positions * parts)
    return moved, channel_cycles(moved, machine.rate)


@compiled
def sum_tiles(
    layer: Any,
    machine: Any,
    price: Any,
    kinds: int,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
    times: NDArray[np.int64],
    total: Any,
) -> None:
    """Fills ``total`` (:data:`TOTALS`) for the tile sizes and the dataflow of ``price``, order and holding apart.

    The position tiles are merged ones.
    """
    pack, tn, tc = price.pack, price.tile_filters, price.tile_channels
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    repeats = 1 if price.level == IMAGES else layer.batch
    filter_tiles, channel_tiles = ceil_div(filters, tn), ceil_div(channels, tc)
    n_last, c_last = filters - (filter_tiles - 1) * tn, channels - (channel_tiles - 1) * tc
    # The position tiles are all alike but for those at the end of the cut: one per run, and a run per plane or row.
    edge = 0
    count = 0
    for i in range(kinds):
        count += times[i]
        if positions[i] != positions[0]:
            edge += times[i]
    total.array_cycles = 0
    total.output_bytes = 0
    total.output_cycles = 0
    total.weight_bytes = 0
    alike = output_aligned(layer, machine.columns, pack)
    for part in range(4):
        is_edge, is_last = part % 2, part // 2
        at = kinds - 1 if is_edge else 0
        m = positions[at]
        n = n_last if is_last else tn
        last_k = gemm_cycles(machine, price.dataflow, m, c_last * layer.taps, n)
        if part == 3:
            total.last_array_cycles = last_k
            last = layer.filters * layer.groups - n
            total.last_output_cycles = output_tile(layer, machine, price, last, m, segments[at], n)[1]
        tiles = (edge if is_edge else count - edge) * repeats * (1 if is_last else filter_tiles - 1)
        if tiles == 0:
            continue
        if channel_tiles > 1:
            last_k += (channel_tiles - 1) * gemm_cycles(machine, price.dataflow, m, tc * layer.taps, n)
        total.array_cycles += tiles * last_k
        if alike:
            moved, end = output_tile(layer, machine, price, 0, m, segments[at], n)
            total.output_bytes += tiles * groups * moved
            total.output_cycles += tiles * groups * end
            continue
        for group in range(groups):
            for f in range(filter_tiles - 1 if is_last else 0, filter_tiles if is_last else filter_tiles - 1):
                moved, end = output_tile(layer, machine, price, group * filters + f * tn, m, segments[at], n)
                total.output_bytes += (edge if is_edge else count - edge) * repeats * moved
                total.output_cycles += (edge if is_edge else count - edge) * repeats * end
    for is_last in range(2):
        n = n_last if is_last else tn
        moved = weight_piece_bytes(layer, machine, tc, n, layer.bias)
        if channel_tiles > 1:
            moved += (channel_tiles - 2) * weight_piece_bytes(layer, machine, tc, n, 0)
            moved += weight_piece_bytes(layer, machine, c_last, n, 0)
        total.weight_bytes += moved * (1 if is_last else filter_tiles - 1)
    total.first_bytes = weight_piece_bytes(layer, machine, tc, tn, layer.bias)
    if not layer.input_on_chip:
        lanes = input_piece(layer, machine.columns, pack, tc, 0, 0, 0)[1]
        whole, size = lanes == layer.channels * layer.groups, layer.in_d * layer.in_h * layer.in_w
        total.first_bytes += map_bytes(inputs[0], segments[0], size, lanes, whole, machine)
    if layer.residual:
        total.first_bytes += output_tile(layer, machine, price, 0, positions[0], segments[0], tn)[0]


@compiled
def bound_cycles(layer: Any, machine: Any, price: Any, position_tiles: int, input_once_bytes: int, total: Any) -> int:
    """Fills ``price``'s bytes and busy cycles for the tiling it names; gives a lower bound of its cycles.

    No schedule is shorter than all computing between the first load and the last store, nor than all loads before the
    last step and its store, nor than all transfers.
    """
    groups = layer.groups // price.pack
    filter_tiles = ceil_div(layer.filters * price.pack, price.tile_filters)
    channel_tiles = ceil_div(layer.channels * price.pack, price.tile_channels)
    steps = position_tiles * filter_tiles * channel_tiles
    price.steps = steps * groups
    price.array_cycles = total.array_cycles * groups
    price.input_bytes = input_once_bytes * (1 if price.hold_input else filter_tiles)
    price.weight_bytes = groups * total.weight_bytes * (1 if price.hold_weights else position_tiles)
    price.output_bytes = total.output_bytes
    price.residual_bytes = price.output_bytes if layer.residual else 0

    loads = steps
    if price.hold_weights and (layer.input_on_chip or price.hold_input):
        loads = filter_tiles * channel_tiles
        # A held input comes with its position tile, if not with the halo or the blocks of another.
        if price.order == POSITIONS_FIRST and not layer.input_on_chip:
            loads += position_tiles - 1
    if layer.residual:
        loads = max(loads, position_tiles * filter_tiles)
    load_cycles = channel_cycles(price.input_bytes + price.weight_bytes + price.residual_bytes, machine.rate)
    waits = machine.latency * (1 if machine.pipelined else loads * groups)
    end = total.last_output_cycles + (0 if layer.output_on_chip else machine.latency)
    price.channel_cycles = load_cycles
    bound = machine.latency + channel_cycles(total.first_bytes, machine.rate) + price.array_cycles + end
    bound = max(bound, load_cycles + waits + total.last_array_cycles + end)
    if not layer.output_on_chip:
        price.channel_cycles += total.output_cycles
        if not machine.pipelined:
            waits += machine.latency * position_tiles * filter_tiles * groups
        bound = max(bound, price.channel_cycles + waits)
    return int(bound)


@compiled
def fill_steps(
    layer: Any,
    machine: Any,
    price: Any,
    count: int,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
    load: NDArray[np.int64],
    compute: NDArray[np.int64],
    store: NDArray[np.int64],
) -> int:
    """Writes the cycles of every step of the tiling that ``price`` names; gives the number of steps.

    The position tiles are those of :func:`loads_fresh`.
    """
    pack, tn, tc = price.pack, price.tile_filters, price.tile_channels
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    position_tiles = count if price.level == IMAGES else count * layer.batch
    filter_tiles, channel_tiles = ceil_div(filters, tn), ceil_div(channels, tc)
    n_last, c_last = filters - (filter_tiles - 1) * tn, channels - (channel_tiles - 1) * tc

    # Tiles differ in a few ways only: by position tile, and in being the last along filters, channels, positions; and,
    # where groups are no whole blocks, by group.
    size, all_channels = layer.in_d * layer.in_h * layer.in_w, layer.channels * layer.groups
    weights = np.empty((2, 2), np.int64)
    array = np.empty((2, 2, 2), np.int64)
    for f in range(2):
        n = n_last if f else tn
        for c in range(2):
            k = c_last if c else tc
            weights[f, c] = weight_piece_bytes(layer, machine, k, n, 0)
            for e in range(2):
                array[e, f, c] = gemm_cycles(
                    machine, price.dataflow, positions[count - 1 if e else 0], k * layer.taps, n
                )
    moved_in = np.empty((channel_tiles, count), np.int64)
    out_bytes = np.empty((filter_tiles, 2), np.int64)
    out_cycles = np.empty((filter_tiles, 2), np.int64)
    alike_in = input_aligned(layer, machine.columns, pack, tc) or layer.input_on_chip
    alike_out = output_aligned(layer, machine.columns, pack)

    outer = filter_tiles if price.order == FILTERS_FIRST else position_tiles
    inner = position_tiles if price.order == FILTERS_FIRST else filter_tiles
    step = 0
    for group in range(groups):
        if group == 0 or not alike_in:
            for c in range(channel_tiles):
                first, last = input_piece(layer, machine.columns, pack, tc, price.hold_input, group, c)
                for i in range(count):
                    if layer.input_on_chip:
                        moved_in[c, i] = 0
                    elif alike_in and 0 < c < channel_tiles - 1:
                        moved_in[c, i] = moved_in[0, i]
                    else:
                        whole = last - first == all_channels
                        moved_in[c, i] = map_bytes(inputs[i], segments[i], size, last - first, whole, machine)
        if group == 0 or not alike_out:
            for f in range(filter_tiles):
                n = n_last if f == filter_tiles - 1 else tn
                for e in range(2):
                    at = count - 1 if e else 0
                    if alike_out and 0 < f < filter_tiles - 1:
                        out_bytes[f, e], out_cycles[f, e] = out_bytes[0, e], out_cycles[0, e]
                    else:
                        out_bytes[f, e], out_cycles[f, e] = output_tile(
                            layer, machine, price, group * filters + f * tn, positions[at], segments[at], n
                        )
        for a in range(outer):
            for b in range(inner):
                p = b if price.order == FILTERS_FIRST else a
                f = a if price.order == FILTERS_FIRST else b
                i = p % count
                e = 1 if positions[i] != positions[0] else 0
                last_f = 1 if f == filter_tiles - 1 else 0
                loads_input = f == 0 or not price.hold_input
                loads_weights = p == 0 or not price.hold_weights
                for c in range(channel_tiles):
                    last_c = 1 if c == channel_tiles - 1 else 0
                    moved = 0
                    if loads_input:
                        moved = moved_in[c, i]
                    if loads_weights and c == 0:
                        moved += weight_piece_bytes(
                            layer, machine, c_last if last_c else tc, n_last if last_f else tn, layer.bias
                        )
                    elif loads_weights:
                        moved += weights[last_f, last_c]
                    if c == 0 and layer.residual:
                        moved += out_bytes[f, e]
                    load[step] = channel_cycles(moved, machine.rate)
                    compute[step] = array[e, last_f, last_c]
                    store[step] = 0
                    step += 1
                store[step - 1] = out_cycles[f, e]
    return step


@compiled
def loads_fresh(price: Any) -> int:
    """Whether a position tile loads only the lines that those before it have not: the whole map stays."""
    return 1 if price.hold_input and price.order == FILTERS_FIRST else 0
