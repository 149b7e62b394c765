"""The Eyeriss chip's published times, and that what is called inferred follows from the rule that is stated."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from accel_sim.pricing.layer import layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.search import price_layers
from accel_sim.row_stationary.passes import MAPPING
from accel_sim.row_stationary.search import price_mappings
from accel_sim.spec_file import load_spec
from accel_sim.validation.eyeriss import (
    NETWORKS,
    ChipRow,
    chip_rows,
    compare,
    mean_absolute_deviation,
    printed_totals_ms,
)

SPEC = load_spec("eyeriss_12x14")
MIB = 1 << 20


@pytest.mark.parametrize("network", NETWORKS)
def test_the_columns_add_up_to_the_printed_totals(network: str) -> None:
    """The rows are rounded to tenths, the totals were added before."""
    rows = chip_rows(network)
    total, processing = printed_totals_ms(network)
    assert sum(row.total_ms for row in rows) == pytest.approx(total, abs=0.15)
    assert sum(row.processing_ms for row in rows) == pytest.approx(processing, abs=0.15)


@pytest.mark.parametrize(("network", "accesses_per_mac"), [("alexnet", 0.0029), ("vgg16", 0.0035)])
def test_layer_shapes_give_the_abstracts_dram_accesses_per_mac(network: str, accesses_per_mac: float) -> None:
    """Megabytes of two-byte words over our count of multiply-adds: a wrong shape would show."""
    rows = chip_rows(network)
    words = sum(row.dram_mb for row in rows) * 1e6 / 2
    assert words / sum(row.layer.macs for row in rows) == pytest.approx(accesses_per_mac, abs=0.00006)


def test_alexnet_is_within_5_percent_with_the_published_mappings() -> None:
    rows = chip_rows("alexnet")
    found = compare(rows, SPEC)
    assert {row.mapping_source for row in rows} == {"published"}
    assert mean_absolute_deviation(found) < 0.05
    assert max(abs(row.deviation) for row in found) < 0.08
    # The mappings occupy as many elements as the chip's table says.
    assert [row.active_elements for row in found] == [row.active_elements for row in rows]


def test_without_the_fitted_constant_alexnet_is_off_by_5_percent_and_too_fast() -> None:
    rows = chip_rows("alexnet")
    found = compare(rows, load_spec("eyeriss_12x14", {"pass_overhead_cycles": "0"}))
    assert mean_absolute_deviation(found) == pytest.approx(0.0504, abs=0.0001)
    assert sum(row.processing_ms for row in found) < printed_totals_ms("alexnet")[1]


def test_the_constant_is_fitted_to_alexnet_alone() -> None:
    """Of the hundreds, 400 and 500 are the best; VGG-16 had no part in it."""
    spread = {
        cycles: mean_absolute_deviation(
            compare(chip_rows("alexnet"), load_spec("eyeriss_12x14", {"pass_overhead_cycles": str(cycles)}))
        )
        for cycles in range(0, 1001, 100)
    }
    assert sorted(sorted(spread, key=spread.__getitem__)[:2]) == [400, 500]
    assert SPEC.row_stationary is not None and SPEC.row_stationary.pass_overhead_cycles == 500


def test_vgg_blocks_1_to_4_are_within_1_percent_with_inferred_mappings() -> None:
    found = compare(chip_rows("vgg16"), SPEC)
    assert {row.chip.mapping_source for row in found} == {"inferred"}
    assert all(abs(row.deviation) < 0.01 for row in found if row.chip.name < "5")
    assert all(-0.04 < row.deviation < 0 for row in found if row.chip.name > "5")


def test_channels_per_pass_follow_from_the_chips_buffer_traffic() -> None:
    """Partial sums come and go once per pass of channels: the largest power of two whose traffic fits the column."""
    for row in chip_rows("vgg16"):
        channels = row.layer.channels
        traffic = {k: 2 * channels / k * row.layer.output_elements * 2 / MIB for k in (1, 2, 4, 8, 16)}
        fitting = [k for k, mib in traffic.items() if mib <= row.global_buffer_mb]
        assert row.channels_per_pass == fitting[0]
        assert traffic[fitting[0]] > 0.8 * row.global_buffer_mb


@pytest.mark.parametrize("row", {row.name[0]: row for row in chip_rows("vgg16")}.values(), ids=lambda row: row.name)
def test_inferred_mappings_are_the_fastest_that_fit(row: ChipRow) -> None:
    """Every n, e, p, q, r, t with the channels per pass of the table, m as large as fits: one by one."""
    assert row.channels_per_pass is not None
    layer, machine = row.layer, machine_record(SPEC)
    size = layer.out[1]
    mappings = []
    for n, e, q, p, t in product((1, 2, 3), range(1, min(size, 56) + 1), range(1, 5), range(1, 25), (1, 2, 3, 4)):
        if row.channels_per_pass % q:
            continue
        r = row.channels_per_pass // q
        sets = 4 * (14 // e) if e <= 14 else 4 // -(-e // 14)
        for wide in range(t, sets // r + 1, 4):
            filters = min(p * wide, layer.filters)
            room = 51_200 - n * row.channels_per_pass * (e + 2) * (size + 2)
            m = min(room // (n * e * size) // filters * filters, layer.filters)
            if p * q * 3 <= 224 and filters * row.channels_per_pass * 9 <= 4096 and m > 0:
                mappings.append((n, e, p, q, r, wide, m))
    table = layer_table([layer.row()] * len(mappings))
    prices = price_mappings(table, machine, np.array(mappings, MAPPING))
    stated = price_mappings(table[:1], machine, np.array([row.mapping], MAPPING))[0]
    assert row.mapping in mappings
    assert stated["array_cycles"] == prices["array_cycles"].min()
    # In the blocks where the psum bus is the bound the time hardly tells mappings apart; the choice proves nothing.
    near = np.abs(prices["array_cycles"] / 2e5 / row.processing_ms - 1) < 0.01
    assert (near.sum() > 1) and near.sum() < len(mappings) / 5


def test_a_free_search_is_not_the_chip() -> None:
    """Four times faster than the chip on VGG-16's second layer: its prices must not be called Eyeriss's."""
    row = chip_rows("vgg16")[1]
    (price,) = price_layers(layer_table([row.layer.row()]), machine_record(SPEC))
    assert price["cycles"] / 2e5 < row.processing_ms / 4


def test_partial_sums_are_most_of_the_chips_buffer_traffic() -> None:
    """In VGG-16 82 to 98 % of it. AlexNet's third layer has a third less than they would be: not explained."""
    for row in compare(chip_rows("vgg16"), SPEC):
        assert 0.81 < row.psum_mb / row.chip.global_buffer_mb < 0.99
    shares = {row.chip.name: row.psum_mb / row.chip.global_buffer_mb for row in compare(chip_rows("alexnet"), SPEC)}
    assert shares.pop("CONV3") == pytest.approx(1.26, abs=0.01)
    assert all(0.7 < share < 0.9 for share in shares.values())


def test_power_is_below_the_chips_and_above_a_third_of_it() -> None:
    for network in NETWORKS:
        for row in compare(chip_rows(network), SPEC):
            assert 0.35 < row.power_mw / row.chip.power_mw < 1


def test_dram_traffic_exceeds_the_chips_by_what_it_compresses() -> None:
    """The chip run-length codes its maps in DRAM; ours are plain. CONV1's input does not compress."""
    ratios = [row.dram_mb / row.chip.dram_mb for row in compare(chip_rows("alexnet"), SPEC)]
    assert all(1.2 < ratio < 1.8 for ratio in ratios)
    assert min(ratios) == ratios[0] or min(ratios) == ratios[1]
