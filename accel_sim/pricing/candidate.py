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
            *("cycles", "array_cycles", "channel_cycles", "input_bytes", "weight_bytes", "output_bytes"),
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


@compiled
def fits(layer: Any, machine: Any, price: Any, max_positions: int, max_inputs: int, position_count: int) -> bool:
    """Whether the tiles find room. A held operand stays for all its uses, another one is loaded for each use.

    Positions first: a held input is one position tile with all its channels, held weights are all of them. Filters
    first: held weights are one filter tile with all its channels, a held input is the whole map. Whatever changes
    during the layer has a second buffer on a double-buffered machine.
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
    if layer.input_on_chip:
        inputs = 0
    elif not price.hold_input:
        inputs = in_flight * max_inputs * tc
    elif price.order == POSITIONS_FIRST:
        inputs = min(buffers, position_count * groups) * max_inputs * channels
    else:
        inputs = min(buffers, groups) * layer.batch * layer.in_d * layer.in_h * layer.in_w * channels
    inputs = inputs * machine.data_bytes + layer.reserved_bytes
    if not price.hold_weights:
        weights = in_flight * tn * (tc * layer.taps * machine.data_bytes + bias)
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
    count: int,
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
) -> int:
    """Bytes moved to load every input tile of one group once, over all images."""
    if layer.input_on_chip:
        return 0
    channels = layer.channels * pack
    whole = tile_channels == channels and pack == layer.groups
    full, rest = channels // tile_channels, channels % tile_channels
    total = 0
    for i in range(count):
        total += full * map_bytes(inputs[i], level, segments[i], tile_channels, whole, machine)
        if rest:
            total += map_bytes(inputs[i], level, segments[i], rest, False, machine)
    return total if level == IMAGES else int(total * layer.batch)


@compiled
def output_piece_bytes(
    layer: Any, machine: Any, pack: int, level: int, positions: int, images: int, filters: int
) -> int:
    """Bytes moved to store ``filters`` channels of a tile."""
    whole = filters == layer.filters * pack and pack == layer.groups
    return map_bytes(positions, level, images if level == IMAGES else 1, filters, whole, machine)


@compiled
def output_cycles(layer: Any, machine: Any, moved: int, positions: int, filters: int) -> int:
    """Cycles to take a tile out of the accumulators: over the channel, or a row of the array's width each cycle."""
    if layer.output_on_chip:
        return int(positions * ceil_div(filters, machine.columns))
    return channel_cycles(moved, machine.rate)


@compiled
def bound_cycles(
    layer: Any,
    machine: Any,
    price: Any,
    count: int,
    positions: NDArray[np.int64],
    inputs: NDArray[np.int64],
    segments: NDArray[np.int64],
    input_once_bytes: int,
) -> int:
    """Fills ``price``'s bytes and busy cycles for the tiling it names; gives a lower bound of its cycles.

    No schedule is shorter than all computing between the first load and the last store, nor than all loads before the
    last step and its store, nor than all transfers.
    """
    pack = price.pack
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    repeats = 1 if price.level == IMAGES else layer.batch
    position_tiles = count * repeats
    tn, tc = price.tile_filters, price.tile_channels
    filter_tiles, channel_tiles = ceil_div(filters, tn), ceil_div(channels, tc)
    n_last, c_last = filters - (filter_tiles - 1) * tn, channels - (channel_tiles - 1) * tc

    # All position tiles but the last along the cut are alike; `count` may hold several such runs (planes, rows).
    edge = 0
    for i in range(count):
        if positions[i] != positions[0]:
            edge += 1
    compute = 0
    stored = 0
    store_cycles = 0
    last_positions = positions[count - 1]
    for is_edge in range(2):
        tiles = edge * repeats if is_edge else (count - edge) * repeats
        if tiles == 0:
            continue
        m = last_positions if is_edge else positions[0]
        images = segments[count - 1] if is_edge else segments[0]
        for is_last in range(2):
            n = n_last if is_last else tn
            filter_count = 1 if is_last else filter_tiles - 1
            if filter_count == 0:
                continue
            part = (channel_tiles - 1) * gemm_cycles(machine, price.dataflow, m, tc * layer.taps, n)
            part += gemm_cycles(machine, price.dataflow, m, c_last * layer.taps, n)
            compute += tiles * filter_count * part
            moved = output_piece_bytes(layer, machine, pack, price.level, m, images, n)
            store_cycles += tiles * filter_count * output_cycles(layer, machine, moved, m, n)
            stored += tiles * filter_count * moved
    weights_once = (filter_tiles - 1) * (
        weight_piece_bytes(layer, machine, tc if channel_tiles > 1 else c_last, tn, True)
    ) + weight_piece_bytes(layer, machine, tc if channel_tiles > 1 else c_last, n_last, True)
    if channel_tiles > 1:
        weights_once += (filter_tiles - 1) * (
            (channel_tiles - 2) * weight_piece_bytes(layer, machine, tc, tn, False)
            + weight_piece_bytes(layer, machine, c_last, tn, False)
        )
        weights_once += (channel_tiles - 2) * weight_piece_bytes(layer, machine, tc, n_last, False)
        weights_once += weight_piece_bytes(layer, machine, c_last, n_last, False)

    steps = position_tiles * filter_tiles * channel_tiles
    price.steps = steps * groups
    price.array_cycles = compute * groups
    price.input_bytes = groups * input_once_bytes * (1 if price.hold_input else filter_tiles)
    price.weight_bytes = groups * weights_once * (1 if price.hold_weights else position_tiles)
    price.output_bytes = 0 if layer.output_on_chip else stored * groups

    loads = steps
    if price.hold_weights and (layer.input_on_chip or price.hold_input):
        tiles = filter_tiles if layer.input_on_chip else position_tiles + filter_tiles - 1
        loads = tiles * channel_tiles
    loads *= groups
    stores = 0 if layer.output_on_chip else position_tiles * filter_tiles * groups
    load_cycles = channel_cycles(price.input_bytes + price.weight_bytes, machine.rate)
    price.channel_cycles = load_cycles + (0 if layer.output_on_chip else store_cycles * groups)
    waits = machine.latency * (1 if machine.pipelined else loads)

    first = weight_piece_bytes(layer, machine, min(tc, channels), min(tn, filters), True)
    if not layer.input_on_chip:
        whole = tc == channels and pack == layer.groups
        first += map_bytes(inputs[0], price.level, segments[0], tc, whole, machine)
    last = gemm_cycles(machine, price.dataflow, last_positions, c_last * layer.taps, n_last)
    moved = output_piece_bytes(layer, machine, pack, price.level, last_positions, segments[count - 1], n_last)
    end = output_cycles(layer, machine, moved, last_positions, n_last)
    if not layer.output_on_chip:
        end += machine.latency
    bound = machine.latency + channel_cycles(first, machine.rate) + price.array_cycles + end
    bound = max(bound, load_cycles + waits + last + end)
    if not layer.output_on_chip:
        latencies = machine.latency * (1 if machine.pipelined else loads + stores)
        bound = max(bound, price.channel_cycles + latencies)
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
    pack = price.pack
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    position_tiles = count if price.level == IMAGES else count * layer.batch
    tn, tc = price.tile_filters, price.tile_channels
    filter_tiles, channel_tiles = ceil_div(filters, tn), ceil_div(channels, tc)
    outer = filter_tiles if price.order == FILTERS_FIRST else position_tiles
    inner = position_tiles if price.order == FILTERS_FIRST else filter_tiles
    step = 0
    for _ in range(groups):
        for a in range(outer):
            for b in range(inner):
                p, f = (b, a) if price.order == FILTERS_FIRST else (a, b)
                i = p % count
                n = min(tn, filters - f * tn)
                for c in range(channel_tiles):
                    k = min(tc, channels - c * tc)
                    moved = 0
                    if not layer.input_on_chip and (f == 0 or not price.hold_input):
                        whole = k == channels and pack == layer.groups
                        moved = map_bytes(inputs[i], price.level, segments[i], k, whole, machine)
                    if p == 0 or not price.hold_weights:
                        moved += weight_piece_bytes(layer, machine, k, n, c == 0)
                    load[step] = channel_cycles(moved, machine.rate)
                    compute[step] = gemm_cycles(machine, price.dataflow, positions[i], k * layer.taps, n)
                    store[step] = 0
                    step += 1
                moved = output_piece_bytes(layer, machine, pack, price.level, positions[i], segments[i], n)
                store[step - 1] = output_cycles(layer, machine, moved, positions[i], n)
    return step
