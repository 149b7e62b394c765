"""Residuals that are loaded into the accumulators: step by step against addresses counted one by one, and as prices."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.energy import layer_energy_pj
from accel_sim.pricing.candidate import PRICE, fill_steps, loads_fresh
from accel_sim.pricing.candidates import list_candidates
from accel_sim.pricing.layer import Layer, conv_layer, gemm_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.price_list import PriceList
from accel_sim.pricing.search import price_layers, price_tilings
from accel_sim.pricing.tiling import position_tiles
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec

BURST = 16


def byte_a_cycle() -> MachineSpec:
    """A machine on which a transfer's cycles are its bytes."""
    sizes = {"rows": "4", "columns": "3", "input_kib": "2", "weight_kib": "2", "accumulator_kib": "2"}
    dram = {"burst_bytes": str(BURST), "latency_cycles": "20", "bytes_per_cycle": "1"}
    return load_spec("edge_16x16", {"dataflows": "ws+os", **sizes, **dram})


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    n = draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    spatial = [k + draw(st.integers(0, 5)) for k in kernel]
    channels, filters = (groups * draw(st.integers(1, 7)) for _ in range(2))
    batch = draw(st.integers(1, 3)) if n else draw(st.integers(1, 30))
    pads = [draw(st.integers(0, k - 1)) for k in kernel] * 2
    return conv_layer(channels, filters, spatial, kernel, pads=pads, groups=groups, batch=batch)


def steps(layer: Layer, spec: MachineSpec, tiling: Any) -> tuple[list[int], list[int], list[int]]:
    table, scratch = layer_table([layer.row()]), np.empty((3, 4096), np.int64)
    cut = int(tiling["level"]), int(tiling["tile_size"]), loads_fresh(tiling)
    count = position_tiles(table[0], *cut, *scratch)
    load, compute, store = np.empty((3, int(tiling["steps"])), np.int64)
    found = fill_steps(table[0], machine_record(spec)[0], tiling, count, *scratch, load, compute, store)
    assert found == len(load)
    return load.tolist(), compute.tolist(), store.tolist()


def tile_bytes(layer: Layer, spec: MachineSpec, tiling: Any) -> list[int]:
    """Whole bursts per output tile, in the order of the tiles, from the addresses of all its elements.

    A map lies image by image, in blocks of the array's columns; position by position within a block.
    """
    pack, tn = int(tiling["pack"]), int(tiling["tile_filters"])
    filters, groups = layer.filters * pack, layer.groups // pack
    sizes = (layer.batch, *layer.out)
    cut = [1 if axis < tiling["level"] else size for axis, size in enumerate(sizes)]
    cut[int(tiling["level"])] = int(tiling["tile_size"])
    ways = [[range(b, min(b + c, s)) for b in range(0, s, c)] for s, c in zip(sizes, cut, strict=True)]
    positions = list(product(*ways))
    blocks = [range(b, min(b + tn, filters)) for b in range(0, filters, tn)]
    per_image = int(np.prod(layer.out))
    found = []
    for group in range(groups):
        order = product(positions, blocks) if tiling["order"] == 0 else ((p, f) for f, p in product(blocks, positions))
        for (images, *box), channels in order:
            addresses: dict[tuple[int, ...], list[int]] = {}
            for image, (d, h, w), channel in product(images, product(*box), channels):
                at = group * filters + channel
                block = at // spec.array.columns * spec.array.columns
                width = min(spec.array.columns, groups * filters - block)
                position = (d * layer.out[1] + h) * layer.out[2] + w
                before = (image * groups * filters + block) * per_image
                # Tiles that are no whole blocks move part by part.
                part = (image, block, (channel - channels[0]) // spec.array.columns)
                whole_blocks = groups == 1 or filters % spec.array.columns == 0 or per_image == 1
                addresses.setdefault(() if whole_blocks else part, []).append(before + position * width + at - block)
            moved = 0
            for part_addresses in addresses.values():
                ordered = sorted(part_addresses)
                ends = [i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
                runs = [b - a for a, b in pairwise([0, *ends, len(ordered)])]
                moved += sum(-(-run // BURST) * BURST for run in runs)
            found.append(moved)
    return found


@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(0, 2**32 - 1))
def test_each_tile_s_residual_comes_with_its_first_step(layer: Layer, seed: int) -> None:
    spec, summed = byte_a_cycle(), replace(layer, residual=True)
    prices, bounds = np.zeros(1 << 14, PRICE), np.zeros(1 << 14, np.int64)
    scratch = np.empty((4, 4096), np.int64)
    count = list_candidates(layer_table([summed.row()])[0], machine_record(spec)[0], *scratch, prices, bounds)
    assert count > 0
    for tiling in prices[np.random.default_rng(seed).integers(0, count, 4)]:
        load, compute, store = steps(layer, spec, tiling)
        with_load, with_compute, with_store = steps(summed, spec, tiling)
        assert (with_compute, with_store) == (compute, store)
        expected, tiles, begins = list(load), iter(tile_bytes(layer, spec, tiling)), True
        for step, stored in enumerate(store):
            expected[step] += next(tiles) if begins else 0
            begins = stored > 0
        assert with_load == expected
        assert next(tiles, None) is None


@settings(max_examples=60, deadline=None)
@given(layers(), st.booleans(), st.sampled_from([1, 4, 64]))
def test_a_residual_costs_something_and_no_more_than_its_transfers(layer: Layer, pipelined: bool, rate: int) -> None:
    base = byte_a_cycle()
    dram = replace(base.dram, pipelined_requests=pipelined, bytes_per_cycle=float(rate))
    roomy = replace(base.scratchpads, accumulator_kib=64)  # the residual's place rules out no tiling
    machine = machine_record(replace(base, dram=dram, scratchpads=roomy))
    plain, summed = (price_layers(layer_table([replace(layer, residual=r).row()]), machine)[0] for r in (False, True))
    assert summed["cycles"] >= plain["cycles"]
    # On the tiling that is best without it, every tile waits at most for a transfer of its own, one after another.
    same = price_tilings(layer_table([replace(layer, residual=True).row()]), machine, np.array([plain]))[0]
    tiles = int(plain["steps"])
    assert summed["cycles"] <= same["cycles"]
    assert same["cycles"] <= plain["cycles"] + same["residual_bytes"] / rate + tiles * (20 + 1)


def test_a_residual_by_hand() -> None:
    """GEMM 8x4x3 on a 4x3 array, one tile, 4 bytes a cycle, bursts of 16, latency 20: residual 24 -> 32 bytes.

    One request at a time: a second tile would cost another latency.
    """
    base = byte_a_cycle()
    spec = replace(
        base,
        array=replace(base.array, dataflows=("ws",)),
        dram=replace(base.dram, bytes_per_cycle=4.0, pipelined_requests=False),
    )
    layer = gemm_layer(8, 4, 3)
    plain, summed = PriceList(spec).layers([layer, replace(layer, residual=True)])
    assert plain.cycles == (20 + (32 + 16) // 4) + 18 + (20 + 32 // 4)
    assert summed.cycles == plain.cycles + 32 // 4
    assert summed.dram_bytes == plain.dram_bytes + 32
    assert summed.record["residual_bytes"] == 32


def test_counts_and_energy_of_a_residual() -> None:
    """It is written beside the accumulators once, as it comes, and read once; it never touches the scratchpad."""
    spec = load_spec()
    layer = conv_layer(16, 16, (32, 32), (3, 3), pads=(1,) * 4)
    tiling = PriceList(spec).layers([layer])[0].record
    tables = [layer_table([replace(layer, residual=r).row()]) for r in (False, True)]
    plain, summed = (price_tilings(t, machine_record(spec), np.array([tiling]))[0] for t in tables)
    elements = 16 * 32 * 32
    for name in ("accumulator_write_bytes", "accumulator_read_bytes"):
        assert summed[name] == plain[name] + elements
    for name in ("scratchpad_read_bytes", "scratchpad_write_bytes", "input_bytes", "weight_bytes", "output_bytes"):
        assert summed[name] == plain[name]
    assert summed["residual_bytes"] == elements
    table = spec.energy
    kept = elements * (table.accumulator_read_pj_per_byte + table.accumulator_write_pj_per_byte)
    more = layer_energy_pj(spec, summed, layer.macs) - layer_energy_pj(spec, plain, layer.macs)
    assert more == pytest.approx(elements * table.dram_pj_per_byte + kept, rel=1e-9)


def test_a_residual_hides_behind_a_layer_that_computes() -> None:
    """A ResNet's 3x3: 16 KiB more through the channel are 1 024 cycles; the first tile's share is all that shows."""
    layer = conv_layer(16, 16, (32, 32), (3, 3), pads=(1,) * 4)
    plain, summed = PriceList(load_spec()).layers([layer, replace(layer, residual=True)])
    assert plain.cycles < summed.cycles < plain.cycles + 1024 / 4


def test_a_sum_does_not_stay_on_chip() -> None:
    with pytest.raises(ValueError, match="cannot stay on chip"):
        replace(gemm_layer(8, 4, 3), residual=True).row(output_on_chip=True)
