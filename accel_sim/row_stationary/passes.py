"""What one mapping of a layer costs: the pass model of a row-stationary array.

A *set* of R x e elements computes e output rows from R kernel rows: element (i, j) slides kernel row i along input row
i + j x stride, partial sums travel up its column. A *pass* runs r x t sets side by side on n images: r of them on
different channels, t on different filters, each element on p filters and q channels. So a pass holds p t filters and
q r channels, and takes

    max(n F S p q,  n p t e F words / psum bus,  n q r rows W words / input bus)
      + p t q r R S words / filter bus  +  overhead

cycles for F output columns and kernels of R x S. Partial sums of n x m x e x F outputs stay in the global buffer while
the channels pass by, so all p t filters of the m meet a piece of the input map that was loaded once. Source: the terms
but the input bus are those that explain the chip's published times (docs/validation.md), overhead is fitted to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div
from accel_sim.pricing.tiling import ROWS, burst_bytes, channel_cycles

ROW_STATIONARY = 3
"""The dataflow's number, after those of :mod:`accel_sim.pricing.array`."""

MAPPING = np.dtype([(name, np.int64) for name in ("n", "e", "p", "q", "r", "t", "m")])
"""The paper's letters: images, output rows, filters and channels per element, sets along channels, sets along filters,
filters whose partial sums the global buffer holds."""

SHAPE = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("images", "filters", "channels", "rows", "columns", "kernel_rows", "kernel_columns"),
            *("stride", "reach", "sent_columns", "loaded_columns", "in_rows", "pad"),
        )
    ]
)
"""One group of a layer as the array sees it: a 2-D convolution, planes of a third axis counted as images.

The array and its buffer see the map with its padding, as the paper's table of layer shapes does: rows of
``sent_columns`` words. DRAM holds it without: ``in_rows`` x ``loaded_columns``.
"""


@compiled
def _dilates(taps: int, reach: int) -> bool:
    """Whether ``taps`` taps can reach over ``reach`` lines with a dilation."""
    return bool(taps == reach or (1 < taps < reach and (reach - 1) % (taps - 1) == 0))


@compiled
def _kernel(layer: Any) -> tuple[int, int, int]:
    """(depth, rows, columns) of the kernel, which the table gives as a product: as square as dilations allow."""
    found = (1, 1, layer.taps)
    best = -1
    for depth in range(1, min(layer.taps, layer.reach_d) + 1):
        if layer.taps % depth:
            continue
        area = layer.taps // depth
        for rows in range(1, min(area, layer.reach_h) + 1):
            columns = area // rows
            if area % rows or columns > layer.reach_w:
                continue
            exact = (
                _dilates(depth, layer.reach_d) and _dilates(rows, layer.reach_h) and _dilates(columns, layer.reach_w)
            )
            score = (2 * layer.taps if exact else layer.taps) - abs(rows - columns)
            if score > best:
                found, best = (depth, rows, columns), score
    return found


@compiled
def fill_shape(layer: Any, machine: Any, shape: Any) -> None:
    """Writes the layer's :data:`SHAPE`.

    A kernel higher than the array, or wider than an element's memories, runs in pieces that count as channels, each
    of which loads its part of the map again.
    """
    depth, rows, columns = _kernel(layer)
    pieces = ceil_div(rows, machine.rows)
    across = ceil_div(columns, min(machine.input_spad_words, machine.filter_spad_words))
    shape.images = layer.batch * layer.out_d
    shape.filters = layer.filters
    shape.channels = layer.channels * depth * pieces * across
    shape.rows, shape.columns = layer.out_h, layer.out_w
    shape.kernel_rows, shape.kernel_columns = ceil_div(rows, pieces), ceil_div(columns, across)
    shape.stride, shape.reach = layer.stride_h, layer.reach_h
    shape.sent_columns = (layer.out_w - 1) * layer.stride_w + layer.reach_w
    shape.loaded_columns = min(shape.sent_columns, layer.in_w)
    shape.in_rows, shape.pad = layer.in_h, layer.pad_h


@compiled
def most_sets(machine: Any, kernel_rows: int, e: int) -> int:
    """Sets of ``kernel_rows`` x ``e`` elements that find room: side by side, or folded where wider than the array."""
    bands = machine.rows // kernel_rows
    if e <= machine.columns:
        return int(bands * (machine.columns // e))
    return int(bands // ceil_div(e, machine.columns))


@compiled
def input_rows(shape: Any, e: int) -> int:
    """Input rows that ``e`` output rows read."""
    return int((e - 1) * shape.stride + shape.reach)


@compiled
def buffered_bytes(shape: Any, layer: Any, machine: Any, mapping: Any) -> int:
    """Bytes of the global buffer that do not grow with m: the present piece of the input map, and maps that stay."""
    if layer.input_on_chip:
        return int(layer.reserved_bytes)
    channels = min(mapping.q * mapping.r, shape.channels)
    words = mapping.n * channels * input_rows(shape, mapping.e) * shape.sent_columns
    return int(words * machine.data_bytes + layer.reserved_bytes)


@compiled
def refusal(shape: Any, layer: Any, machine: Any, mapping: Any) -> int:
    """0 where the machine can run ``mapping``; else 1 too many sets, 2 an element's memory, 3 filters, 4 buffer."""
    sets = most_sets(machine, shape.kernel_rows, mapping.e)
    if mapping.r * mapping.t > sets:
        return 1
    row_words = mapping.q * shape.kernel_columns
    spads = row_words <= machine.input_spad_words and mapping.p * row_words <= machine.filter_spad_words
    if not spads or mapping.p > machine.psum_spad_words:
        return 2
    filters = min(mapping.p * mapping.t, shape.filters) * min(mapping.q * mapping.r, shape.channels)
    if filters * shape.kernel_rows * shape.kernel_columns * machine.data_bytes > machine.weight_bytes:
        return 3
    psums = mapping.n * mapping.m * mapping.e * shape.columns * machine.accumulator_bytes
    if psums + buffered_bytes(shape, layer, machine, mapping) > machine.input_bytes + machine.accumulator_capacity:
        return 4
    return 0


@compiled
def _array_cycles(shape: Any, machine: Any, mapping: Any) -> int:
    """Cycles of all passes of one group; the last one along an axis holds what is left."""
    filters, channels = mapping.p * mapping.t, mapping.q * mapping.r
    taps = shape.kernel_rows * shape.kernel_columns
    data_bits, psum_bits = 8 * machine.data_bytes, 8 * machine.accumulator_bytes
    total = 0
    for part in range(16):
        n_rest, e_rest, m_rest, c_rest = part % 2, part // 2 % 2, part // 4 % 2, part // 8
        n = shape.images % mapping.n if n_rest else mapping.n
        e = shape.rows % mapping.e if e_rest else mapping.e
        m = shape.filters % filters if m_rest else filters
        c = shape.channels % channels if c_rest else channels
        count = (1 if n_rest else shape.images // mapping.n) * (1 if e_rest else shape.rows // mapping.e)
        count *= (1 if m_rest else shape.filters // filters) * (1 if c_rest else shape.channels // channels)
        if count * n * e * m * c == 0:
            continue
        compute = n * shape.columns * shape.kernel_columns * ceil_div(m, mapping.t) * ceil_div(c, mapping.r)
        psums = ceil_div(n * m * e * shape.columns * psum_bits, machine.psum_bus_bits)
        inputs = ceil_div(n * c * input_rows(shape, e) * shape.sent_columns * data_bits, machine.input_bus_bits)
        weights = ceil_div(m * c * taps * data_bits, machine.filter_bus_bits)
        total += count * (max(compute, psums, inputs) + weights + machine.pass_overhead)
    return int(total)


@compiled
def _strip_bytes(shape: Any, machine: Any, e: int, channels: int) -> int:
    """DRAM bytes of all strips of e output rows, of ``channels`` channels of one image: pieces in whole bursts."""
    if e >= shape.rows:
        words = channels * min(input_rows(shape, shape.rows), shape.in_rows) * shape.loaded_columns
        return burst_bytes(words * machine.data_bytes, machine.burst)
    total = 0
    for first in range(0, shape.rows, e):
        last = min(first + e, shape.rows) - 1
        begin = max(first * shape.stride - shape.pad, 0)
        end = min(last * shape.stride - shape.pad + shape.reach, shape.in_rows)
        words = max(end - begin, 0) * shape.loaded_columns
        total += burst_bytes(words * machine.data_bytes, machine.burst)
    return total * channels


@compiled
def price_mapping(shape: Any, layer: Any, machine: Any, mapping: Any, price: Any) -> None:
    """Fills ``price`` (:data:`accel_sim.pricing.candidate.PRICE`) for ``mapping``, whether it fits or not.

    Loads and stores overlap with the passes, but for the first pass's operands and the last results. The scratchpad's
    columns are the global buffer's: input and filters in, input and filters out to the elements; the accumulator's are
    its partial sums, which leave and return with every channel pass.
    """
    filters, channels = min(mapping.p * mapping.t, shape.filters), min(mapping.q * mapping.r, shape.channels)
    taps = shape.kernel_rows * shape.kernel_columns
    image_groups, strips = ceil_div(shape.images, mapping.n), ceil_div(shape.rows, mapping.e)
    filter_passes, channel_passes = ceil_div(shape.filters, filters), ceil_div(shape.channels, channels)
    groups = layer.groups
    data, accumulator, burst, rate = machine.data_bytes, machine.accumulator_bytes, machine.burst, machine.rate

    price.dataflow, price.order, price.level, price.pack = ROW_STATIONARY, 0, ROWS, 1
    price.tile_size, price.tile_filters, price.tile_channels = mapping.e, filters, channels
    price.steps = image_groups * strips * filter_passes * channel_passes * groups
    price.array_cycles = _array_cycles(shape, machine, mapping) * groups

    # The input map: once where all channels of a piece find room, or once per m filters.
    pool = machine.input_bytes + machine.accumulator_capacity - layer.reserved_bytes
    psums = mapping.n * mapping.m * mapping.e * shape.columns * accumulator
    piece_words = mapping.n * input_rows(shape, mapping.e) * shape.sent_columns
    price.hold_input = 1 if psums + piece_words * shape.channels * data <= pool else 0
    input_loads = 0
    price.input_bytes = 0
    if not layer.input_on_chip:
        times = 1 if price.hold_input else ceil_div(shape.filters, mapping.m)
        input_loads = times * image_groups * strips * channel_passes
        rest = shape.channels % channels
        moved = (shape.channels // channels) * _strip_bytes(shape, machine, mapping.e, channels)
        if rest:
            moved += _strip_bytes(shape, machine, mapping.e, rest)
        price.input_bytes = times * shape.images * moved * groups
    # Filters: for every strip anew, unless all of them find room.
    bias = shape.filters * accumulator if layer.bias else 0
    all_filters = shape.filters * shape.channels * taps * data
    price.hold_weights = 1 if all_filters + bias <= machine.weight_bytes else 0
    times = 1 if price.hold_weights else image_groups * strips
    weight_loads = times * filter_passes * channel_passes
    piece = burst_bytes(filters * channels * taps * data, burst)
    moved = 0
    for part in range(4):
        m = shape.filters % filters if part % 2 else filters
        c = shape.channels % channels if part // 2 else channels
        pieces = (1 if part % 2 else shape.filters // filters) * (1 if part // 2 else shape.channels // channels)
        moved += pieces * burst_bytes(m * c * taps * data, burst)
    price.weight_bytes = times * (moved + burst_bytes(bias, burst)) * groups
    # Results: a strip of each filter, or whole maps in a row; they leave with the last channel pass of their filters.
    price.output_bytes = 0
    stores = 0
    last = 0
    if not layer.output_on_chip:
        stores = image_groups * strips * filter_passes
        last_rows = shape.rows - (strips - 1) * mapping.e
        if strips == 1:
            moved = burst_bytes(shape.filters * shape.rows * shape.columns * data, burst)
        else:
            full = burst_bytes(mapping.e * shape.columns * data, burst)
            moved = shape.filters * ((strips - 1) * full + burst_bytes(last_rows * shape.columns * data, burst))
        price.output_bytes = shape.images * moved * groups
        kept = shape.filters - (filter_passes - 1) * filters
        words = (shape.images - (image_groups - 1) * mapping.n) * kept * last_rows * shape.columns
        last = machine.latency + channel_cycles(burst_bytes(words * data, burst), rate)
    price.residual_bytes = price.output_bytes if layer.residual else 0

    moved = price.input_bytes + price.weight_bytes + price.residual_bytes + price.output_bytes
    price.channel_cycles = channel_cycles(moved, rate)
    waits = 1
    if not machine.pipelined:
        waits = (input_loads + weight_loads + stores * (2 if layer.residual else 1)) * groups
    on_channel = price.channel_cycles + waits * machine.latency
    first_bytes = piece
    if not layer.input_on_chip:
        rows = min(input_rows(shape, mapping.e), shape.in_rows)
        first_bytes += burst_bytes(mapping.n * channels * rows * shape.loaded_columns * data, burst)
    first = machine.latency + channel_cycles(first_bytes, rate)
    if machine.buffers > 1:
        price.cycles = max(first + price.array_cycles + last, on_channel)
    else:
        price.cycles = price.array_cycles + on_channel

    sent = filter_passes * shape.images * shape.channels * shape.sent_columns
    whole, rest = shape.rows // mapping.e, shape.rows % mapping.e
    rows = whole * input_rows(shape, mapping.e) + (input_rows(shape, rest) if rest else 0)
    to_elements = sent * rows + image_groups * strips * shape.filters * shape.channels * taps
    price.scratchpad_read_bytes = to_elements * groups * data
    price.scratchpad_write_bytes = price.input_bytes + price.weight_bytes
    results = shape.images * shape.filters * shape.rows * shape.columns * groups
    if layer.output_on_chip:
        price.scratchpad_write_bytes += results * data
    starts = 1 if layer.residual else 0
    price.accumulator_write_bytes = (channel_passes + starts) * results * accumulator
    # The first pass of a result begins at zero, or reads the residual; the store reads the last one.
    price.accumulator_read_bytes = (channel_passes + starts) * results * accumulator
