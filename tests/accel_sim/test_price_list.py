"""Chains with maps on chip, vector operations, energy: against enumeration and sums by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.energy import layer_energy_pj, vector_energy_pj
from accel_sim.pricing.candidate import PRICE
from accel_sim.pricing.layer import Layer, conv_layer, gemm_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.price_list import NoTilingError, PriceList
from accel_sim.pricing.search import price_layers
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec


def tucker(channels: int, rank: int, size: int) -> tuple[Layer, ...]:
    """1x1, 3x3, 1x1."""
    return (
        conv_layer(channels, rank, (size, size), (1, 1), bias=False),
        conv_layer(rank, rank, (size, size), (3, 3), pads=(1,) * 4, bias=False),
        conv_layer(rank, channels, (size, size), (1, 1)),
    )


def cheapest_by_enumeration(chain: tuple[Layer, ...], spec: MachineSpec) -> tuple[int, int]:
    """Cycles and bytes of the best of all 2^(n-1) choices of maps that stay."""
    found = []
    for stays in product((False, True), repeat=len(chain) - 1):
        flags = (False, *stays, False)
        rows = [
            layer.row(before, after, before * layer.input_elements + after * layer.output_elements)
            for layer, (before, after) in zip(chain, pairwise(flags), strict=True)
        ]
        prices = price_layers(layer_table(rows), machine_record(spec))
        if (prices["cycles"] >= 0).all():
            moved = prices["input_bytes"] + prices["weight_bytes"] + prices["output_bytes"]
            found.append((int(prices["cycles"].sum()), int(moved.sum())))
    return min(found)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.integers(3, 12),
    st.integers(4, 16),
    st.sampled_from(["2", "8"]),
)
def test_chains_are_the_best_of_all_choices(widths: list[int], size: int, kib: int, rate: str) -> None:
    spec = load_spec("edge_16x16", {"sram_kib": str(kib), "bytes_per_cycle": rate})
    chain = tuple(
        conv_layer(a, b, (size, size), (k, k), pads=(k // 2,) * 4)
        for i, (a, b) in enumerate(pairwise(widths))
        if (k := 3 if i % 2 else 1)
    )
    price = PriceList(spec).chains([chain])[0]
    assert (price.cycles, price.dram_bytes) == cheapest_by_enumeration(chain, spec)
    alone = PriceList(spec).layers(chain)
    assert price.layerwise_cycles == sum(stage.cycles for stage in alone)
    assert price.layerwise_dram_bytes == sum(stage.dram_bytes for stage in alone)
    assert price.cycles <= price.layerwise_cycles
    assert price.fused == (price.cycles != price.layerwise_cycles or price.dram_bytes != price.layerwise_dram_bytes)


@pytest.mark.parametrize("rank", [8, 16, 33])
def test_without_maps_on_chip_a_chain_is_its_layers(rank: int) -> None:
    spec, chain = load_spec(), tucker(64, rank, 28)
    apart = PriceList(spec, maps_on_chip=False)
    (price,) = apart.chains([chain])
    alone = PriceList(spec).layers(chain)
    assert not price.fused
    assert (price.cycles, price.dram_bytes) == (price.layerwise_cycles, price.layerwise_dram_bytes)
    assert price.cycles == sum(stage.cycles for stage in alone)
    (least,) = apart.least([chain], True, True)
    assert least[0, 0, 0] == price.cycles
    assert np.isinf(least[1]).all() and np.isinf(least[:, 1]).all()
    assert PriceList(spec).chains([chain])[0].dram_bytes < price.dram_bytes


def test_a_map_that_stays_is_neither_stored_nor_loaded() -> None:
    """56x56, 64 -> 16 -> 16 -> 64: only input, output and weights move, in bursts of 64; both maps of 50 176 B stay.

    1 024 + 2 304 + 1 024 weights, and 64 biases of 4 bytes.
    """
    price = PriceList(load_spec()).chains([tucker(64, 16, 56)])[0]
    assert [stage.output_on_chip for stage in price.stages] == [True, True, False]
    assert [stage.input_on_chip for stage in price.stages] == [False, True, True]
    assert price.dram_bytes == 2 * 64 * 56 * 56 + 1024 + 2304 + 1024 + 256
    assert price.layerwise_dram_bytes - price.dram_bytes >= 2 * 2 * 50_176
    assert price.dram_bytes <= 0.7 * price.layerwise_dram_bytes


def test_a_map_too_large_for_the_scratchpad_goes_to_dram() -> None:
    """The 50 176 byte maps do not fit 32 KiB; 16 x 14 x 14 do."""
    small = load_spec("edge_16x16", {"sram_kib": "32"})
    large_map, small_map = PriceList(small).chains([tucker(64, 16, 56), tucker(64, 16, 14)])
    assert not large_map.fused
    assert small_map.fused


@pytest.mark.parametrize("key", ["sram_kib", "bytes_per_cycle"])
def test_more_memory_or_bandwidth_never_slows_a_chain(key: str) -> None:
    values = {"sram_kib": ("32", "64", "128", "256", "512"), "bytes_per_cycle": ("1", "2", "5", "16", "64")}[key]
    chains = [tucker(64, rank, size) for rank, size in product((5, 16, 33), (7, 28, 56))]
    cycles = np.array([[p.cycles for p in PriceList(load_spec("edge_16x16", {key: v})).chains(chains)] for v in values])
    assert (np.diff(cycles, axis=0) <= 0).all()
    assert cycles[0].sum() > cycles[-1].sum()


def test_the_cache_changes_nothing() -> None:
    chains = [tucker(32, rank, 14) for rank in (3, 8, 3)]
    prices = PriceList(load_spec())
    first = [(c.cycles, c.dram_bytes, c.energy_pj) for c in prices.chains(chains)]
    again = [(c.cycles, c.dram_bytes, c.energy_pj) for c in prices.chains(chains[::-1])][::-1]
    fresh = [(c.cycles, c.dram_bytes, c.energy_pj) for c in PriceList(load_spec()).chains(chains)]
    assert first == again == fresh
    assert first[0] == first[2] != first[1]


def test_vector_operations() -> None:
    """1 000 bytes in, 500 out, 2 000 operations on 16 lanes, bursts of 64, 16 B a cycle, one request at a time.

    One chunk: load 100 + 64, compute 125, store 100 + 32. Two would pay two latencies more and save 62 + 32 at most.
    """
    serial = load_spec("edge_16x16", {"pipelined_requests": "false"})
    price = PriceList(serial).vectors([(1000, 0, 500, 2000)])[0]
    assert (price.cycles, price.dram_bytes, price.chunks) == (100 + 64 + 125 + 100 + 32, 1024 + 512, 1)
    assert PriceList(load_spec()).vectors([(1000, 0, 500, 2000)])[0].cycles < price.cycles


def test_vector_operations_overlap_and_stay_above_the_bounds() -> None:
    spec = load_spec()
    works = [(n, 0, n, 4 * n) for n in (1 << 12, 1 << 16, 1 << 20)] + [(3 << 16, 1 << 16, 1 << 16, 1 << 16)]
    for (first, second, outward, operations), price in zip(works, PriceList(spec).vectors(works), strict=True):
        inward = first + second
        compute, transfers = operations / spec.vector.lanes, price.dram_bytes / spec.dram.bytes_per_cycle
        assert price.dram_bytes >= inward + outward
        assert (
            max(compute, transfers) < price.cycles < compute + transfers + 2 * spec.dram.latency_cycles * price.chunks
        )
        assert -(-inward // price.chunks) * min(price.chunks, 2) <= spec.scratchpads.input_kib * 1024


def test_no_tiling_is_an_error_that_names_the_machine() -> None:
    tiny = load_spec("edge_16x16", {"sram_kib": "2", "accumulator_kib": "1"})
    with pytest.raises(NoTilingError, match="edge_16x16"):
        PriceList(tiny).layers([conv_layer(1, 1, (9000,), (8000,))])


def test_energy_is_counts_times_the_table() -> None:
    spec = load_spec("eyeriss_12x14")
    record = np.zeros(1, PRICE)[0]
    for value, name in enumerate(("scratchpad_read_bytes", "scratchpad_write_bytes", "accumulator_read_bytes"), 2):
        record[name] = value
    record["accumulator_write_bytes"], record["cycles"] = 5, 7
    record["input_bytes"], record["weight_bytes"], record["residual_bytes"], record["output_bytes"] = 10, 20, 5, 25
    expected = 11 * 6.0 + (2 + 3 + 4 + 5) * 7.5 + 60 * 230.0 + 7 * 150.0
    assert layer_energy_pj(spec, record, macs=11) == pytest.approx(expected, rel=1e-12)
    assert vector_energy_pj(spec, 7, 60, 11) == pytest.approx(11 * 2.0 + 60 * (230.0 + 15.0) + 7 * 150.0, rel=1e-12)


def test_counts_scale_with_the_batch() -> None:
    """Twice the rows: the same weights, twice the rest."""
    spec = load_spec("edge_16x16", {"burst_bytes": "1"})
    one, two = PriceList(spec).layers([gemm_layer(256, 64, 16), gemm_layer(512, 64, 16)])
    for name in ("input_bytes", "output_bytes", "accumulator_write_bytes"):
        assert 2 * one.record[name] == two.record[name]
    assert one.record["weight_bytes"] == two.record["weight_bytes"] == 1024


def test_a_wider_word_moves_more() -> None:
    spec = load_spec("edge_16x16", {"burst_bytes": "1"})
    wide = replace(spec, datatypes=replace(spec.datatypes, data_bits=16))
    layer = gemm_layer(256, 64, 16)
    assert PriceList(wide).layers([layer])[0].dram_bytes == 2 * PriceList(spec).layers([layer])[0].dram_bytes
