"""One tiling of one layer: what it moves in all, a lower bound of its cycles, and its steps for the event model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div, gemm_cycles
from accel_sim.pricing.tiling import IMAGES, channel_cycles, map_bytes, weight_piece_bytes

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
"""Sums over all tiles of one group, each loaded once; what the first step loads; how long the last one takes."""


@compiled
def fits(layer: Any, machine: Any, price: Any, max_positions: int, max_inputs: int, position_count: int) -> bool:
    """Whether the tiles find room. A held operand stays for all its uses, another one is loaded for each use.

    Positions first: a held input is one position tile with all its channels, held weights are all of them. Filters
    first: held weights are one filter tile with all its channels, a held input is the whole map. Whatever changes
    during the layer has a second buffer on a double-buffered machine.

    A residual takes no room of its own: it is widened into the accumulators that its tile computes in. These are free
    by then, for its load follows the store that frees them through the same channel.
    """
    pack, tn, tc = price.pack, price.tile_filters, price.tile_channels
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    filter_tiles, channel_tiles = ceil_div(filters, tn), ceil_div(channels, tc)
    output_tiles = position_count * filter_tiles * groups
    buffers = machine.buffers
    accumulators = min(buffers, output_tiles) * max_positions * tn
    if accumulators * machine.accumulator_bytes > machine.accumulator_capacity:
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
        inputs = max_inputs * channels_in_flight
    elif price.order == POSITIONS_FIRST:
        inputs = min(buffers, position_count * groups) * max_inputs * channels
    else:
        inputs = min(buffers, groups) * layer.batch * layer.in_d * layer.in_h * layer.in_w * channels
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
def input_sum(
    layer: Any,
    machine: Any,
    pack: int,
    level: int,
    tile_channels: int,
    kinds: int,
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
    times: NDArray[np.int64],
) -> int:
    """Bytes moved to load every input tile of one group once, over all images; tiles merged."""
    if layer.input_on_chip:
        return 0
    channels = layer.channels * pack
    whole = tile_channels == channels and pack == layer.groups
    full, rest = channels // tile_channels, channels % tile_channels
    total = 0
    for i in range(kinds):
        moved = full * map_bytes(inputs[i], level, segments[i], tile_channels, whole, machine)
        if rest:
            moved += map_bytes(inputs[i], level, segments[i], rest, False, machine)
        total += times[i] * moved
    return total if level == IMAGES else int(total * layer.batch)


@compiled
def output_tile(layer: Any, machine: Any, price: Any, positions: int, images: int, filters: int) -> tuple[int, int]:
    """(DRAM bytes, cycles) to take ``filters`` channels of a tile out of the accumulators.

    Over the channel; or, into the scratchpad, a row of the array's width each cycle.
    """
    if layer.output_on_chip:
        return 0, int(positions * ceil_div(filters, machine.columns))
    whole = filters == layer.filters * price.pack and price.pack == layer.groups
    moved = map_bytes(positions, price.level, images if price.level == IMAGES else 1, filters, whole, machine)
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
    channels, filters = layer.channels * pack, layer.filters * pack
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
    for part in range(4):
        is_edge, is_last = part % 2, part // 2
        at = kinds - 1 if is_edge else 0
        m = positions[at]
        n = n_last if is_last else tn
        last_k = gemm_cycles(machine, price.dataflow, m, c_last * layer.taps, n)
        moved, end = output_tile(layer, machine, price, m, segments[at], n)
        if part == 3:
            total.last_array_cycles = last_k
            total.last_output_cycles = end
        tiles = (edge if is_edge else count - edge) * repeats * (1 if is_last else filter_tiles - 1)
        if tiles == 0:
            continue
        if channel_tiles > 1:
            last_k += (channel_tiles - 1) * gemm_cycles(machine, price.dataflow, m, tc * layer.taps, n)
        total.array_cycles += tiles * last_k
        total.output_bytes += tiles * moved
        total.output_cycles += tiles * end
    for is_last in range(2):
        n = n_last if is_last else tn
        moved = weight_piece_bytes(layer, machine, tc, n, layer.bias)
        if channel_tiles > 1:
            moved += (channel_tiles - 2) * weight_piece_bytes(layer, machine, tc, n, 0)
            moved += weight_piece_bytes(layer, machine, c_last, n, 0)
        total.weight_bytes += moved * (1 if is_last else filter_tiles - 1)
    total.first_bytes = weight_piece_bytes(layer, machine, tc, tn, layer.bias)
    if not layer.input_on_chip:
        whole = tc == channels and pack == layer.groups
        total.first_bytes += map_bytes(inputs[0], price.level, segments[0], tc, whole, machine)
    if layer.residual:
        total.first_bytes += output_tile(layer, machine, price, positions[0], segments[0], tn)[0]


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
    price.input_bytes = groups * input_once_bytes * (1 if price.hold_input else filter_tiles)
    price.weight_bytes = groups * total.weight_bytes * (1 if price.hold_weights else position_tiles)
    price.output_bytes = total.output_bytes * groups
    price.residual_bytes = price.output_bytes if layer.residual else 0

    loads = steps
    if price.hold_weights and layer.input_on_chip:
        loads = filter_tiles * channel_tiles
    elif price.hold_weights and price.hold_input:
        loads = (position_tiles + filter_tiles - 1) * channel_tiles
    if layer.residual:
        loads = max(loads, position_tiles * filter_tiles)
    load_cycles = channel_cycles(price.input_bytes + price.weight_bytes + price.residual_bytes, machine.rate)
    waits = machine.latency * (1 if machine.pipelined else loads * groups)
    end = total.last_output_cycles + (0 if layer.output_on_chip else machine.latency)
    price.channel_cycles = load_cycles
    bound = machine.latency + channel_cycles(total.first_bytes, machine.rate) + price.array_cycles + end
    bound = max(bound, load_cycles + waits + total.last_array_cycles + end)
    if not layer.output_on_chip:
        price.channel_cycles += total.output_cycles * groups
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
    """Writes the cycles of every step of the tiling that ``price`` names; gives the number of steps."""
    pack, tn, tc = price.pack, price.tile_filters, price.tile_channels
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    position_tiles = count if price.level == IMAGES else count * layer.batch
    filter_tiles, channel_tiles = ceil_div(filters, tn), ceil_div(channels, tc)
    n_last, c_last = filters - (filter_tiles - 1) * tn, channels - (channel_tiles - 1) * tc

    # Tiles differ in a few ways only: by position tile, and in being the last along filters, channels, positions.
    whole = tc == channels and pack == layer.groups
    input_full = np.zeros(count, np.int64)
    input_last = np.zeros(count, np.int64)
    if not layer.input_on_chip:
        for i in range(count):
            input_full[i] = map_bytes(inputs[i], price.level, segments[i], tc, whole, machine)
            input_last[i] = map_bytes(inputs[i], price.level, segments[i], c_last, whole, machine)
    weights = np.empty((2, 2), np.int64)
    array = np.empty((2, 2, 2), np.int64)
    out = np.empty((2, 2), np.int64)
    residual = np.zeros((2, 2), np.int64)
    for f in range(2):
        n = n_last if f else tn
        for c in range(2):
            k = c_last if c else tc
            weights[f, c] = weight_piece_bytes(layer, machine, k, n, 0)
            for e in range(2):
                array[e, f, c] = gemm_cycles(
                    machine, price.dataflow, positions[count - 1 if e else 0], k * layer.taps, n
                )
        for e in range(2):
            at = count - 1 if e else 0
            tile_bytes, out[e, f] = output_tile(layer, machine, price, positions[at], segments[at], n)
            if layer.residual:
                residual[e, f] = tile_bytes

    outer = filter_tiles if price.order == FILTERS_FIRST else position_tiles
    inner = position_tiles if price.order == FILTERS_FIRST else filter_tiles
    step = 0
    for _ in range(groups):
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
                        moved = input_last[i] if last_c else input_full[i]
                    if loads_weights and c == 0:
                        moved += weight_piece_bytes(
                            layer, machine, c_last if last_c else tc, n_last if last_f else tn, layer.bias
                        )
                    elif loads_weights:
                        moved += weights[last_f, last_c]
                    if c == 0:  # the value that the tile's sums start from
                        moved += residual[e, last_f]
                    load[step] = channel_cycles(moved, machine.rate)
                    compute[step] = array[e, last_f, last_c]
                    store[step] = 0
                    step += 1
                store[step - 1] = out[e, last_f]
    return step
