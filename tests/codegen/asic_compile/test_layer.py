"""Layers on the engine: bytes against plain integer convolutions, cycles and DRAM bytes against the price list."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.pricing.layer import Layer, conv_layer
from accel_sim.pricing.price_list import NoTilingError, PriceList
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from tests.codegen.asic_compile import layer_programs as lp

Three = tuple[int, int, int]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, Three, Three]:
    """A layer with its kernel and dilations, all three axes."""
    n = draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    dilations = [draw(st.integers(1, 2)) for _ in range(n)]
    spatial = [d * (k - 1) + 1 + draw(st.integers(0, 6)) for k, d in zip(kernel, dilations, strict=True)]
    pads = [draw(st.integers(0, k - 1)) for k in kernel]
    layer = conv_layer(
        groups * draw(st.integers(1, 9)),
        groups * draw(st.integers(1, 9)),
        spatial,
        kernel,
        [draw(st.integers(1, 2)) for _ in range(n)],
        dilations,
        pads * 2,
        groups,
        draw(st.integers(1, 3)) if n else draw(st.integers(1, 30)),
        draw(st.booleans()),
    )
    return replace(layer, residual=draw(st.booleans())), _three(kernel), _three(dilations)


def _three(values: list[int]) -> Three:
    a, b, c = (*(1,) * (3 - len(values)), *values)
    return a, b, c


@st.composite
def machines(draw: st.DrawFn) -> MachineSpec:
    """Small odd machines: blocks that are no multiple of rows, one buffer, slow and serial channels."""
    rows, columns = draw(st.sampled_from([(4, 3), (4, 6), (4, 4), (3, 5)]))
    flags = ("double_buffered", "pipelined_requests", "weight_shadow", "drain_overlap", "shared_input_weight")
    changes = {flag: str(draw(st.booleans())).lower() for flag in flags}
    changes |= {"rows": str(rows), "columns": str(columns), "dataflows": "ws+os+is", "latency_cycles": "20"}
    changes |= {"input_kib": "2", "weight_kib": "2", "accumulator_kib": "2"}
    changes["burst_bytes"] = draw(st.sampled_from(["1", "16", "64"]))
    changes["bytes_per_cycle"] = draw(st.sampled_from(["1", "3", "4", "16"]))
    return load_spec("edge_16x16", changes)


@settings(max_examples=40, deadline=None)
@given(layers(), machines(), st.integers(0, 2**32 - 1))
def test_any_tiling_of_any_layer(drawn: tuple[Layer, Three, Three], spec: MachineSpec, seed: int) -> None:
    """Not only the best tiling: any that fits, on whose buffers nothing overlaps what is in use."""
    layer, kernel, dilations = drawn
    values = lp.random_values(layer, kernel, dilations, seed)
    found = lp.tilings(layer, spec)
    for tiling in found[np.random.default_rng(seed).integers(0, len(found), 2)]:
        price = lp.priced(layer, spec, tiling)
        y, wanted, result = lp.run_chain(spec, [price], [values])
        assert np.array_equal(y, wanted)
        assert result.cycles == price.cycles
        assert lp.moved_bytes(result) == price.dram_bytes


@settings(max_examples=25, deadline=None)
@given(st.data(), machines(), st.integers(0, 2**32 - 1))
def test_chains_with_maps_on_chip(data: st.DataObject, spec: MachineSpec, seed: int) -> None:
    """Any tiling of each stage beside the maps that stay, from none to all."""
    widths = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=4))
    size = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 7))
    batch = data.draw(st.integers(1, 2))
    kernels = [data.draw(st.integers(1, 3)) for _ in widths[1:]]
    stays = [False, *(data.draw(st.booleans()) for _ in widths[2:]), False]
    stages = [
        conv_layer(a, b, size, (k, 1), pads=(k // 2, 0, (k - 1) // 2, 0), batch=batch, bias=data.draw(st.booleans()))
        for (a, b), k in zip(pairwise(widths), kernels, strict=True)
    ]
    stages[-1] = replace(stages[-1], residual=data.draw(st.booleans()))
    rng = np.random.default_rng(seed)
    prices = []
    for layer, on_chip in zip(stages, pairwise(stays), strict=True):
        kept = on_chip[0] * layer.input_elements + on_chip[1] * layer.output_elements
        found = lp.tilings(layer, spec, on_chip, kept)
        if not len(found):
            return
        prices.append(lp.priced(layer, spec, rng.choice(found), on_chip, kept))
    values = [lp.random_values(stage, (1, k, 1), (1, 1, 1), seed) for stage, k in zip(stages, kernels, strict=True)]
    y, wanted, result = lp.run_chain(spec, prices, values)
    assert np.array_equal(y, wanted)
    assert lp.layer_cycles(result) == [price.cycles for price in prices]
    assert lp.moved_bytes(result) == sum(price.dram_bytes for price in prices)


@pytest.mark.parametrize("preset", ["edge_16x16", "gemmini_16x16", "tpu_256x256"])
@pytest.mark.parametrize(
    ("channels", "filters", "size", "kernel", "stride", "groups"),
    [
        (64, 64, 14, 3, 1, 1),
        (40, 72, 15, 3, 2, 1),
        (32, 24, 9, 1, 2, 1),
        (96, 96, 12, 3, 1, 96),
        (48, 24, 11, 5, 1, 6),
        (3, 20, 33, 3, 2, 1),
        (300, 10, 1, 1, 1, 1),
    ],
)
def test_the_best_tiling_on_the_presets(
    preset: str, channels: int, filters: int, size: int, kernel: int, stride: int, groups: int
) -> None:
    spec = load_spec(preset)
    pads = (kernel // 2,) * 4
    layer = conv_layer(channels, filters, (size, size), (kernel, kernel), (stride, stride), pads=pads, groups=groups)
    if spec.array.residual_on_drain:
        layer = replace(layer, residual=True)
    price = PriceList(spec).layers([layer])[0]
    y, wanted, result = lp.run_chain(spec, [price], [lp.random_values(layer, (1, kernel, kernel), (1, 1, 1), size)])
    assert np.array_equal(y, wanted)
    assert (result.cycles, lp.moved_bytes(result)) == (price.cycles, price.dram_bytes)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=3, max_size=4), st.integers(4, 16), st.sampled_from(["8", "16", "256"]))
def test_the_best_choice_of_maps_on_chip(widths: list[int], size: int, kib: str) -> None:
    spec = load_spec("edge_16x16", {"sram_kib": kib})
    kernels = [3 if i % 2 else 1 for i in range(len(widths) - 1)]
    chain = [
        conv_layer(a, b, (size, size), (k, k), pads=(k // 2,) * 4)
        for (a, b), k in zip(pairwise(widths), kernels, strict=True)
    ]
    try:
        price = PriceList(spec).chains([chain])[0]
    except NoTilingError:
        return
    values = [lp.random_values(stage, (1, k, k), (1, 1, 1), size) for stage, k in zip(chain, kernels, strict=True)]
    y, wanted, result = lp.run_chain(spec, list(price.stages), values)
    assert np.array_equal(y, wanted)
    assert (result.cycles, lp.moved_bytes(result)) == (price.cycles, price.dram_bytes)
