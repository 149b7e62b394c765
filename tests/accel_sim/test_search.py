"""Tilings and their search: bytes by brute force over tiles, the minimum over all candidates, and what must hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.pricing.candidate import PRICE
from accel_sim.pricing.candidates import list_candidates
from accel_sim.pricing.layer import Layer, conv_layer, gemm_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.search import price_layers, price_tilings
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec


def small_spec(**changes: str) -> MachineSpec:
    base = {"rows": "4", "columns": "3", "input_kib": "2", "weight_kib": "2", "accumulator_kib": "2"}
    more = {"dataflows": "ws+os+is", "burst_bytes": "16", "latency_cycles": "20", "bytes_per_cycle": "4"}
    return load_spec("edge_16x16", {**base, **more, **changes})


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    n = draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    spatial = [k + draw(st.integers(0, 6)) for k in kernel]
    pads = [draw(st.integers(0, k - 1)) for k in kernel]
    return conv_layer(
        groups * draw(st.integers(1, 9)),
        groups * draw(st.integers(1, 9)),
        spatial,
        kernel,
        [draw(st.integers(1, 2)) for _ in range(n)],
        (),
        pads * 2,
        groups,
        draw(st.integers(1, 3)) if n else draw(st.integers(1, 40)),
        draw(st.booleans()),
    )


def summed(layer: Layer) -> Layer:
    """The layer with a residual."""
    return replace(layer, residual=True)


def candidates(layer: Layer, spec: MachineSpec) -> tuple[np.ndarray, np.ndarray]:
    """All candidates and their bounds."""
    table, machine = layer_table([layer.row()]), machine_record(spec)
    scratch = np.empty((4, 4096), np.int64)
    prices, bounds = np.zeros(1 << 15, PRICE), np.zeros(1 << 15, np.int64)
    found = list_candidates(table[0], machine[0], *scratch, prices, bounds)
    assert found >= 0
    return prices[:found], bounds[:found]


def brute_force_bytes(layer: Layer, price: Any, spec: MachineSpec) -> tuple[int, int, int]:
    """Payload bytes (input, weights, output) of a tiling at bursts of one byte, tile by tile, tap by tap."""
    width, wide = spec.datatypes.data_bytes, spec.datatypes.accumulator_bytes
    pack = int(price["pack"])
    channels, filters, groups = layer.channels * pack, layer.filters * pack, layer.groups // pack
    size, level = int(price["tile_size"]), int(price["level"])
    sizes = (layer.batch, *layer.out)
    cut = [1 if axis < level else sizes[axis] for axis in range(4)]
    cut[level] = size
    tiles = [
        [range(begin, min(begin + c, total)) for begin in range(0, total, c)]
        for total, c in zip(sizes, cut, strict=True)
    ]

    def lines(axis: int, outputs: range) -> range:
        """Input lines that a run of outputs reads, padding left out; all of an axis inside the one that is cut."""
        s, r, p, limit = layer.stride[axis], layer.reach[axis], layer.pad[axis], layer.size[axis]
        if axis + 1 > level:
            return range(limit)
        read = [i for o in outputs for i in range(o * s - p, o * s - p + r)]
        return range(max(min(read), 0), max(min(max(read) + 1, limit), 0))

    tn, tc, columns = int(price["tile_filters"]), int(price["tile_channels"]), spec.array.columns
    n_tiles = [min(tn, filters - i) for i in range(0, filters, tn)]
    inputs = weights = outputs = 0
    for group in range(groups):
        kept: dict[int, np.ndarray] = {}  # what a held input has on chip, by position tile or for the whole map
        for p, position in enumerate(product(*tiles)):
            images, *box = position
            place = p if price["order"] == 0 else 0
            for f, n in enumerate(n_tiles):
                for k, first in enumerate(range(group * channels, (group + 1) * channels, tc)):
                    last = min(first + tc, (group + 1) * channels)
                    if f == 0 or not price["hold_input"]:
                        read = np.zeros((layer.batch, layer.groups * layer.channels, *layer.size), bool)
                        blocks = range(first // columns * columns, min(-(-last // columns) * columns, read.shape[1]))
                        read[np.ix_(images, blocks, *(lines(a, run) for a, run in enumerate(box)))] = True
                        if price["hold_input"]:
                            read &= ~kept.get(place, np.False_)
                            kept[place] = kept.get(place, np.False_) | read
                        inputs += int(read.sum()) * width
                    if p == 0 or not price["hold_weights"]:
                        weights += (last - first) * layer.taps * n * width
                        weights += n * wide if layer.bias and k == 0 else 0
                outputs += int(np.prod([len(run) for run in position])) * n * width
    return inputs, weights, outputs


@settings(max_examples=60, deadline=None)
@given(layers() | layers().map(summed), st.integers(0, 2**32 - 1))
def test_bytes_are_those_of_the_tiles(layer: Layer, seed: int) -> None:
    spec = small_spec(burst_bytes="1")
    prices, _ = candidates(layer, spec)
    for price in prices[np.random.default_rng(seed).integers(0, len(prices), 8)]:
        found = tuple(int(price[name]) for name in ("input_bytes", "weight_bytes", "output_bytes"))
        assert found == brute_force_bytes(layer, price, spec)
        assert price["residual_bytes"] == layer.residual * price["output_bytes"]


@settings(max_examples=60, deadline=None)
@given(layers() | layers().map(summed), st.booleans(), st.booleans(), st.booleans())
def test_the_search_finds_the_minimum_and_bounds_hold(
    layer: Layer, pipelined: bool, doubled: bool, shadow: bool
) -> None:
    flags = {"pipelined_requests": pipelined, "double_buffered": doubled, "weight_shadow": shadow}
    spec = small_spec(**{name: str(value).lower() for name, value in flags.items()})
    prices, bounds = candidates(layer, spec)
    table = layer_table([layer.row()] * len(prices))
    run = price_tilings(table, machine_record(spec), prices)
    assert (bounds <= run["cycles"]).all()
    moved = run["input_bytes"] + run["weight_bytes"] + run["residual_bytes"] + run["output_bytes"]
    best = np.lexsort((np.arange(len(run)), moved, run["cycles"]))[0]
    assert price_layers(table[:1], machine_record(spec))[0] == run[best]


@settings(max_examples=60, deadline=None)
@given(layers() | layers().map(summed))
def test_never_under_the_roofline(layer: Layer) -> None:
    spec = small_spec()
    price = price_layers(layer_table([layer.row()]), machine_record(spec))[0]
    moved = int(price["input_bytes"] + price["weight_bytes"] + price["residual_bytes"] + price["output_bytes"])
    assert price["cycles"] >= moved / spec.dram.bytes_per_cycle
    assert price["cycles"] >= price["array_cycles"] >= layer.macs / spec.peak_macs_per_cycle
    assert price["cycles"] >= price["channel_cycles"]
    # Every weight and every output moves at least once, whatever the tiling.
    assert price["weight_bytes"] >= layer.groups * layer.channels * layer.taps * layer.filters
    assert price["output_bytes"] >= layer.output_elements
    assert price["accumulator_write_bytes"] >= 4 * layer.output_elements


@settings(max_examples=60, deadline=None)
@given(
    layers() | layers().map(summed),
    st.sampled_from(["bytes_per_cycle", "input_kib", "weight_kib", "accumulator_kib", "latency_cycles"]),
)
def test_more_machine_is_never_slower(layer: Layer, key: str) -> None:
    values = {"bytes_per_cycle": "7", "latency_cycles": "11"}.get(key, "3")
    table = layer_table([layer.row()])
    before = price_layers(table, machine_record(small_spec()))[0]
    after = price_layers(table, machine_record(small_spec(**{key: values})))[0]
    assert 0 < after["cycles"] <= before["cycles"]


def test_memory_that_holds_no_tile_gives_no_price() -> None:
    layer = conv_layer(1, 1, (3000,), (2900,), bias=False)  # one tap more than 2 KiB x 2
    spec = small_spec()
    assert price_layers(layer_table([layer.row()]), machine_record(spec))[0]["cycles"] == -1


def test_equal_layers_have_equal_prices_in_any_order() -> None:
    machine = machine_record(small_spec())
    rows = [gemm_layer(m, 8, 8).row() for m in (3, 9, 3, 5, 9)]
    prices = price_layers(layer_table(rows), machine)
    assert (prices[[0, 1]] == prices[[2, 4]]).all()
    assert (prices == np.concatenate([price_layers(layer_table([row]), machine) for row in rows])).all()


@pytest.mark.parametrize(("rows", "step"), [(16, 16), (8, 8)])
def test_the_staircase_of_a_rank(rows: int, step: int) -> None:
    """A 3x3 layer of r -> r channels at 14x14: r and r + 1 lie on one step, but for a multiple of the array's side."""
    machine = machine_record(load_spec("edge_16x16", {"rows": str(rows), "columns": str(rows)}))
    ranks = range(2, 4 * step + 2)
    table = layer_table([conv_layer(r, r, (14, 14), (3, 3), pads=(1,) * 4).row() for r in ranks])
    cycles = dict(zip(ranks, price_layers(table, machine)["cycles"].tolist(), strict=True))
    inside = [cycles[r + 1] / cycles[r] for r in range(step + 2, 2 * step - 1)]
    assert cycles[step + 1] > 1.5 * cycles[step]
    assert max(inside) < 1.1


def test_a_packed_depthwise_layer_beats_one_group_after_another() -> None:
    """3x3 depthwise, 64 channels: 64 folds alone; 4 runs of 16 groups fill 144 = 9 x 16 rows: 36 folds."""
    spec = load_spec("edge_16x16")
    layer = conv_layer(64, 64, (28, 28), (3, 3), pads=(1,) * 4, groups=64, bias=False)
    table = layer_table([layer.row()])
    best = price_layers(table, machine_record(spec))[0]
    assert best["pack"] == 16
    prices, _ = candidates(layer, spec)
    alone = prices[prices["pack"] == 1]
    serial = price_tilings(layer_table([layer.row()] * len(alone)), machine_record(spec), alone)
    assert best["cycles"] < 0.7 * serial["cycles"].min()
    # The zero blocks are loaded like weights: 4 blocks of 16 x 16 x 9 at the least.
    assert best["weight_bytes"] >= 4 * 16 * 16 * 9


def test_a_dense_layer_by_hand() -> None:
    """GEMM 8x4x3 on a 4x3 array, one tile: load 32 + 12 bytes in bursts of 16, 4 B a cycle, latency 20; 4 + 8 + 4 + 2
    cycles of array (R + T + R + C - 1 = 4 + 8 + 4 + 3 - 1); store 24 -> 32 bytes.
    """
    spec = small_spec(dataflows="ws")
    price = price_layers(layer_table([gemm_layer(8, 4, 3).row()]), machine_record(spec))[0]
    assert price["cycles"] == (20 + (32 + 16) // 4) + 18 + (20 + 32 // 4)
    assert [int(price[f"{name}_bytes"]) for name in ("input", "weight", "output")] == [32, 16, 32]


def test_a_single_buffer_is_never_faster() -> None:
    table = layer_table([conv_layer(64, 64, (28, 28), (3, 3), pads=(1,) * 4).row()])
    spec = load_spec()
    single = replace(spec, scratchpads=replace(spec.scratchpads, double_buffered=False))
    assert (
        price_layers(table, machine_record(single))["cycles"][0]
        > price_layers(table, machine_record(spec))["cycles"][0]
    )
