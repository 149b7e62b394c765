"""The best mapping of each layer on a row-stationary array, and prices of mappings that are given.

The mappings found are this machine's best. They are not those of the Eyeriss chip, whose compiler chose others: for
VGG-16's second layer the best one is four times as fast as the chip was measured to be. Prices of the chip's own
mappings come from :func:`price_mappings`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div
from accel_sim.pricing.candidate import PRICE
from accel_sim.row_stationary.passes import (
    MAPPING,
    SHAPE,
    buffered_bytes,
    fill_shape,
    input_rows,
    most_sets,
    price_mapping,
    refusal,
)

REFUSALS = (
    "more sets than the array has room for",
    "more words per element than its memories hold",
    "more filters per pass than the filter buffer holds",
    "partial sums and input that the global buffer has no room for",
)
_GRID = 64


@compiled
def split_axis(total: int, most: int, unit: int, sizes: NDArray[np.int64]) -> int:
    """Writes tile sizes worth trying, none above ``most``, into ``sizes``; gives their number.

    ``total`` in 1, 2, 3, 4, 6, 8, 12, ... parts; multiples of ``unit`` and whole fractions of it.
    """
    count = 0
    parts = 1
    while True:
        size = ceil_div(total, parts)
        if size <= most:
            count = _add(size, sizes, count)
        if parts >= total:
            break
        power_of_two = parts & (parts - 1) == 0  # else three times one
        parts = max(parts * 3 // 2, 2) if power_of_two else parts // 3 * 4
    for i in range(1, unit + 1):
        if unit * i <= min(total, most):
            count = _add(unit * i, sizes, count)
        if unit // i <= min(total, most):
            count = _add(unit // i, sizes, count)
    return count


@compiled
def _add(size: int, sizes: NDArray[np.int64], count: int) -> int:
    for i in range(count):
        if sizes[i] == size:
            return count
    if count == sizes.size:
        return count
    sizes[count] = size
    return count + 1


@compiled
def moved_bytes(price: Any) -> int:
    return int(price.input_bytes + price.weight_bytes + price.residual_bytes + price.output_bytes)


@compiled
def _bound(shape: Any, machine: Any, mapping: Any) -> int:
    """What the passes of one group take at least."""
    taps = shape.kernel_rows * shape.kernel_columns
    image_groups, strips = ceil_div(shape.images, mapping.n), ceil_div(shape.rows, mapping.e)
    channel_passes = ceil_div(shape.channels, mapping.q * mapping.r)
    passes = image_groups * strips * channel_passes * ceil_div(shape.filters, mapping.p * mapping.t)
    compute = shape.images * strips * shape.columns * shape.kernel_columns
    compute *= ceil_div(shape.filters, mapping.t) * ceil_div(shape.channels, mapping.r)
    psums = shape.images * shape.filters * shape.rows * shape.columns * channel_passes
    weights = image_groups * strips * shape.filters * shape.channels * taps * 8 * machine.data_bytes
    busy = max(compute, psums * 8 * machine.accumulator_bytes // machine.psum_bus_bits)
    return int(busy + weights // machine.filter_bus_bits + passes * machine.pass_overhead)


@compiled
def _hold_most(shape: Any, layer: Any, machine: Any, mapping: Any) -> bool:
    """Sets m to the most filters whose partial sums find room; False where those of one pass do not.

    Beside all channels of a piece of the input, which is then loaded once, or else beside those of a pass.
    """
    filters = min(mapping.p * mapping.t, shape.filters)
    per_filter = mapping.n * mapping.e * shape.columns * machine.accumulator_bytes
    pool = machine.input_bytes + machine.accumulator_capacity
    whole = mapping.n * input_rows(shape, mapping.e) * shape.sent_columns * shape.channels * machine.data_bytes
    if layer.input_on_chip:
        whole = 0
    most = (pool - layer.reserved_bytes - whole) // per_filter
    if most < filters:
        most = (pool - buffered_bytes(shape, layer, machine, mapping)) // per_filter
    mapping.m = shape.filters if most >= shape.filters else max(most, 0) // filters * filters
    return bool(mapping.m > 0)


@compiled
def _try_widths(
    shape: Any, layer: Any, machine: Any, trials: NDArray[Any], prices: NDArray[Any], winners: NDArray[Any]
) -> None:
    """Tries all p and q for the n, e, r and t of ``trials[0]``; ``prices`` is (best, trial)."""
    trial, price = trials[0], prices[1]
    row_words = shape.kernel_columns
    most_q = min(machine.input_spad_words // row_words, ceil_div(shape.channels, trial.r))
    for q in range(most_q, 0, -1):
        passes = ceil_div(shape.channels, q * trial.r)
        if q > 1 and ceil_div(shape.channels, (q - 1) * trial.r) == passes:
            continue  # as many passes, shorter ones
        most_p = min(machine.psum_spad_words, machine.filter_spad_words // (q * row_words))
        for p in range(min(most_p, ceil_div(shape.filters, trial.t)), 0, -1):
            passes = ceil_div(shape.filters, p * trial.t)
            if p > 1 and ceil_div(shape.filters, (p - 1) * trial.t) == passes:
                continue
            trial.p, trial.q = p, q
            fewest = prices[0].cycles
            if fewest >= 0 and _bound(shape, machine, trial) * layer.groups > fewest:
                break  # a smaller p has more passes, and no less of anything
            if not _hold_most(shape, layer, machine, trial) or refusal(shape, layer, machine, trial):
                continue
            price_mapping(shape, layer, machine, trial, price)
            if fewest < 0 or (price.cycles, moved_bytes(price)) < (fewest, moved_bytes(prices[0])):
                prices[0] = prices[1]
                winners[0] = trials[0]


@compiled
def _search_each(layers: NDArray[Any], machines: NDArray[Any], prices: NDArray[Any], mappings: NDArray[Any]) -> None:
    machine = machines[0]
    images, strips = np.empty(_GRID, np.int64), np.empty(_GRID, np.int64)
    shapes, trials, both = np.zeros(1, SHAPE), np.zeros(1, MAPPING), np.zeros(2, PRICE)
    shape, trial = shapes[0], trials[0]
    for at in range(layers.size):
        layer = layers[at]
        fill_shape(layer, machine, shape)
        both[0].cycles = -1
        widest = machine.columns * (machine.rows // shape.kernel_rows)
        image_sizes = split_axis(shape.images, shape.images, 1, images)
        strip_sizes = split_axis(shape.rows, widest, machine.columns, strips)
        for i in range(image_sizes):
            for s in range(strip_sizes):
                trial.n, trial.e = images[i], strips[s]
                sets = most_sets(machine, shape.kernel_rows, trial.e)
                r = min(sets, shape.channels)
                while r > 0:  # for each t, the largest r
                    trial.r, trial.t = r, min(sets // r, shape.filters)
                    _try_widths(shape, layer, machine, trials, both, mappings[at : at + 1])
                    r = sets // (trial.t + 1) if trial.t < shape.filters else 0
        prices[at] = both[0]


@compiled
def _price_each(layers: NDArray[Any], machines: NDArray[Any], mappings: NDArray[Any], prices: NDArray[Any]) -> int:
    """Prices the layers under ``mappings``; gives 0, or 8 times the place of one that is refused, and the reason."""
    machine = machines[0]
    shapes = np.zeros(1, SHAPE)
    for at in range(layers.size):
        fill_shape(layers[at], machine, shapes[0])
        reason = refusal(shapes[0], layers[at], machine, mappings[at])
        if reason:
            return int(8 * at + reason)
        price_mapping(shapes[0], layers[at], machine, mappings[at], prices[at])
    return 0


def best_mappings(layers: NDArray[Any], machine: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(prices, mappings), both of shape (len(layers),): :data:`PRICE` and :data:`MAPPING` of the fewest cycles, then
    the least DRAM traffic.

    ``layers`` is an array of :data:`accel_sim.pricing.layer.LAYER`; ``cycles`` -1: no mapping fits.
    """
    prices, mappings = np.zeros(len(layers), PRICE), np.zeros(len(layers), MAPPING)
    _search_each(layers, machine, prices, mappings)
    return prices, mappings


def price_mappings(layers: NDArray[Any], machine: NDArray[Any], mappings: NDArray[Any]) -> NDArray[Any]:
    """Prices of given mappings: row i of ``mappings`` (:data:`MAPPING`) is that of layer i.

    Raises ValueError for a mapping that the machine cannot run, with its place and the reason.
    """
    for name in MAPPING.names or ():
        if (mappings[name] < 1).any():
            raise ValueError(f"mapping {int(np.argmax(mappings[name] < 1))}: {name} must be at least 1")
    prices = np.zeros(len(layers), PRICE)
    refused = _price_each(layers, machine, mappings, prices)
    if refused:
        raise ValueError(f"mapping {refused // 8}: {REFUSALS[refused % 8 - 1]}")
    return prices
