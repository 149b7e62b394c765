"""The mapping search against enumeration, and what must hold of its results."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.pricing.candidate import PRICE
from accel_sim.pricing.layer import Layer, conv_layer, gemm_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.price_list import PriceList
from accel_sim.pricing.search import price_layers, price_tilings
from accel_sim.row_stationary.passes import MAPPING
from accel_sim.row_stationary.search import best_mappings, price_mappings, split_axis
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec

SMALL = {"rows": "4", "columns": "3", "input_kib": "1", "accumulator_kib": "1", "weight_kib": "1"}
SPADS = {"filter_spad_words": "24", "input_spad_words": "6", "psum_spad_words": "4"}


def layer_of(channels: int, filters: int, size: int, kernel: int, batch: int) -> Layer:
    return conv_layer(channels, filters, (size, size), (kernel, kernel), pads=(kernel // 2,) * 4, batch=batch)


def least_of_all(layer: Layer, spec: MachineSpec) -> int:
    """Fewest cycles of every mapping there is, one by one."""
    sets, batch = spec.peak_macs_per_cycle, layer.batch
    axes = (batch, layer.out[1], 4, 6, min(sets, layer.channels), min(sets, layer.filters), layer.filters)
    table, machine = layer_table([layer.row()]), machine_record(spec)
    best = None
    for mapping in product(*(range(1, most + 1) for most in axes)):
        _, _, p, _, r, t, m = mapping
        filters = min(p * t, layer.filters)
        if r * t > sets or (m % filters and m != layer.filters):
            continue
        try:
            found = price_mappings(table, machine, np.array([mapping], MAPPING))[0]
        except ValueError:
            continue
        if best is None or found["cycles"] < best:
            best = int(found["cycles"])
    assert best is not None
    return best


@pytest.mark.parametrize("shape", [(3, 4, 5, 3, 1), (5, 3, 6, 1, 1), (2, 5, 7, 2, 2), (7, 6, 1, 1, 3)])
def test_the_search_finds_the_least_of_all_mappings(shape: tuple[int, ...]) -> None:
    layer, spec = layer_of(*shape), load_spec("eyeriss_12x14", {**SMALL, **SPADS})
    (found,), (mapping,) = best_mappings(layer_table([layer.row()]), machine_record(spec))
    again = price_mappings(layer_table([layer.row()]), machine_record(spec), np.array([mapping], MAPPING))[0]
    assert found == again
    assert found["cycles"] == least_of_all(layer, spec)


def grid(total: int, most: int, unit: int) -> list[int]:
    sizes = np.empty(64, np.int64)
    return [int(size) for size in sizes[: split_axis(total, most, unit, sizes)]]


def test_axes_are_cut_in_parts_and_array_widths() -> None:
    assert sorted(grid(56, 56, 14)) == [1, 2, 3, 4, 5, 7, 10, 14, 19, 28, 42, 56]
    assert grid(1, 56, 14) == [1]
    assert max(grid(224, 56, 14)) == 56 and {14, 28, 42, 56} <= set(grid(224, 56, 14))


LAYERS = [
    layer_of(channels, filters, size, kernel, 1)
    for channels, filters, size, kernel in product((3, 64), (16, 100), (7, 28), (1, 3, 5))
] + [
    layer_of(16, 64, 112, 3, 1),
    gemm_layer(1, 512, 100),
    gemm_layer(50, 64, 64, bias=True),
    conv_layer(32, 32, (14, 14), (3, 3), groups=32),
]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("bytes_per_cycle", ("0.5", "1", "3", "8", "64")),
        ("accumulator_kib", ("1", "16", "64", "128", "4096")),
        ("weight_kib", ("2", "8", "32", "1024")),
        ("psum_bus_bits", ("16", "48", "64", "1024")),
        ("pass_overhead_cycles", ("5000", "500", "0")),
    ],
)
def test_more_of_anything_is_never_slower(key: str, values: tuple[str, ...]) -> None:
    table = layer_table([layer.row() for layer in LAYERS])
    cycles = np.array(
        [price_layers(table, machine_record(load_spec("eyeriss_12x14", {key: v})))["cycles"] for v in values]
    )
    assert (cycles > 0).all()
    assert (np.diff(cycles, axis=0) <= 0).all()
    assert cycles[0].sum() > cycles[-1].sum()


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 300), st.integers(1, 300), st.integers(1, 60), st.sampled_from([1, 2, 3, 5, 7, 11])),
    st.integers(1, 4),
)
def test_no_price_is_below_the_roofline(channels: int, filters: int, size: int, kernel: int, batch: int) -> None:
    spec = load_spec("eyeriss_12x14")
    layer = layer_of(channels, filters, size + kernel, kernel, batch)
    (price,) = PriceList(spec).layers([layer])
    moved = price.dram_bytes
    compulsory = 2 * (layer.output_elements + channels * filters * kernel**2)
    assert moved >= compulsory
    assert price.cycles >= max(layer.macs / spec.peak_macs_per_cycle, moved / spec.dram.bytes_per_cycle)


def test_price_layers_gives_the_searched_prices_and_keeps_the_order() -> None:
    machine = machine_record(load_spec("eyeriss_12x14"))
    table = layer_table([layer.row() for layer in (*LAYERS, *LAYERS[:3])])
    found = price_layers(table, machine)
    np.testing.assert_array_equal(found[: len(LAYERS)], best_mappings(table[: len(LAYERS)], machine)[0])
    np.testing.assert_array_equal(found[len(LAYERS) :], found[:3])
    assert (found["dataflow"] == 3).all()


def test_a_layer_without_a_mapping_says_so() -> None:
    tiny = load_spec("eyeriss_12x14", {"input_kib": "1", "accumulator_kib": "1"})
    table = layer_table([conv_layer(1, 1, (9000,), (3,)).row()])
    assert price_layers(table, machine_record(tiny))["cycles"].tolist() == [-1]


def test_tilings_are_of_systolic_arrays() -> None:
    machine = machine_record(load_spec("eyeriss_12x14"))
    with pytest.raises(ValueError, match="no tilings"):
        price_tilings(layer_table([LAYERS[0].row()]), machine, np.zeros(1, PRICE))


def test_chains_keep_maps_on_chip() -> None:
    """16 x 28 x 28 words are 24.5 KiB of 100: they stay."""
    chain = (
        conv_layer(64, 16, (28, 28), (1, 1), bias=False),
        conv_layer(16, 16, (28, 28), (3, 3), pads=(1,) * 4, bias=False),
        conv_layer(16, 64, (28, 28), (1, 1)),
    )
    price = PriceList(load_spec("eyeriss_12x14")).chains([chain])[0]
    assert price.fused and price.cycles < price.layerwise_cycles
    assert price.dram_bytes <= price.layerwise_dram_bytes - 2 * 16 * 28 * 28 * 2
