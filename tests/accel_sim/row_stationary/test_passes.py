"""The pass model against a machine that is walked pass by pass, element by element of each map."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accel_sim.pricing.layer import Layer, conv_layer, gemm_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.row_stationary.passes import MAPPING, SHAPE, fill_shape, most_sets
from accel_sim.row_stationary.search import price_mappings
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec

ROOMY = load_spec(
    "eyeriss_12x14",
    {
        **{"weight_kib": "64", "input_kib": "512", "burst_bytes": "1", "latency_cycles": "0"},
        **{"filter_spad_words": "4096", "input_spad_words": "256", "psum_spad_words": "64"},
    },
)


def price(layer: Layer, spec: MachineSpec, mapping: tuple[int, ...], *stays: Any) -> Any:
    table = layer_table([layer.row(*stays)])
    return price_mappings(table, machine_record(spec), np.array([mapping], MAPPING))[0]


def pieces(total: int, size: int) -> list[range]:
    return [range(first, min(first + size, total)) for first in range(0, total, size)]


@st.composite
def layers_and_mappings(draw: st.DrawFn) -> tuple[Layer, tuple[int, ...], int, int]:
    """With the kernel's size and the stride along rows."""
    kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    size, pad = draw(st.integers(kernel, 18)), draw(st.integers(0, kernel // 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters, batch = draw(st.integers(1, 9)), draw(st.integers(1, 11)), draw(st.integers(1, 5))
    layer = conv_layer(
        *(channels * groups, filters * groups, (size, size), (kernel, kernel), (stride, stride)),
        pads=(pad,) * 4,
        groups=groups,
        batch=batch,
        bias=False,
    )
    n, e = draw(st.integers(1, batch)), draw(st.integers(1, layer.out[1]))
    p, q = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    sets = int(most_sets(machine_record(ROOMY)[0], kernel, e))
    assume(sets > 0)
    r = draw(st.integers(1, sets))
    t = draw(st.integers(1, sets // r))
    m = min(p * t * draw(st.integers(1, 4)), filters)
    return layer, (n, e, p, q, r, t, m), kernel, stride


@settings(max_examples=150, deadline=None)
@given(layers_and_mappings())
def test_cycles_are_those_of_the_passes_one_by_one(case: tuple[Layer, tuple[int, ...], int, int]) -> None:
    """Words are 16 bits: four psums or filter words a cycle and one of the input."""
    layer, (n, e, p, q, r, t, _), kernel, stride = case
    width = layer.out[2]
    row_words = (width - 1) * stride + kernel
    cycles = steps = 0
    for images, rows, filters, channels in product(
        pieces(layer.batch, n), pieces(layer.out[1], e), pieces(layer.filters, p * t), pieces(layer.channels, q * r)
    ):
        # Filters and channels are dealt out to the sets evenly; each element slides each of its rows over the map's.
        slides = len(images) * max(map(len, np.array_split(filters, t))) * max(map(len, np.array_split(channels, r)))
        psum_words = len(images) * len(filters) * len(rows) * width
        input_words = len(images) * len(channels) * ((len(rows) - 1) * stride + kernel) * row_words
        filter_words = len(filters) * len(channels) * kernel * kernel
        cycles += max(slides * width * kernel, ceil(psum_words / 4), input_words) + ceil(filter_words / 4) + 500
        steps += 1
    found = price(layer, ROOMY, case[1])
    assert found["array_cycles"] == cycles * layer.groups
    assert found["steps"] == steps * layer.groups
    assert found["cycles"] >= found["array_cycles"] >= layer.macs / ROOMY.peak_macs_per_cycle


@settings(max_examples=100, deadline=None)
@given(layers_and_mappings(), st.sampled_from([1, 3, 64]))
def test_traffic_is_that_of_the_pieces_one_by_one(case: tuple[Layer, tuple[int, ...], int, int], kib: int) -> None:
    layer, mapping, kernel, stride = case
    n, e, p, q, r, t, m = mapping
    spec = replace(ROOMY, scratchpads=replace(ROOMY.scratchpads, weight_kib=kib))
    filter_words = kernel * kernel * min(p * t, layer.filters) * min(q * r, layer.channels)
    assume(filter_words * 2 <= kib * 1024)
    found = price(layer, spec, mapping)
    pad, size, width = layer.pad[1], layer.size[1], layer.out[2]
    columns = min((width - 1) * stride + kernel, size)
    padded_columns = (width - 1) * stride + kernel
    held = layer.filters * layer.channels * kernel * kernel * 2 <= kib * 1024
    weights = loaded = sent = psum_moves = outputs = 0
    for i, (images, rows) in enumerate(product(pieces(layer.batch, n), pieces(layer.out[1], e))):
        if i == 0 or not held:
            weights += layer.filters * layer.channels * kernel * kernel
        real = {y for row in rows for y in range(row * stride - pad, row * stride - pad + kernel)} & set(range(size))
        real = set(range(min(real), max(real) + 1)) if real else real  # lines between the strides move too
        reloads = 1 if found["hold_input"] else len(pieces(layer.filters, m))
        loaded += reloads * len(images) * layer.channels * len(real) * columns
        tall = (len(rows) - 1) * stride + kernel
        passes = len(pieces(layer.filters, p * t))
        sent += passes * len(images) * layer.channels * tall * padded_columns
        sent += layer.filters * layer.channels * kernel * kernel
        results = len(images) * layer.filters * len(rows) * width
        outputs += results
        psum_moves += results * len(pieces(layer.channels, q * r))
    words = layer.groups * 2
    assert found["weight_bytes"] == weights * words
    assert found["input_bytes"] == loaded * words
    assert found["output_bytes"] == outputs * words == layer.output_elements * 2
    assert found["scratchpad_read_bytes"] == sent * words
    assert found["scratchpad_write_bytes"] == (loaded + weights) * words
    assert found["accumulator_read_bytes"] == found["accumulator_write_bytes"] == psum_moves * words
    rate = spec.dram.bytes_per_cycle
    assert found["cycles"] >= (loaded + weights + outputs) * words / rate


def test_a_mapping_by_hand() -> None:
    """AlexNet's third layer under the chip's mapping: 6 x 64 passes of 64 filters and 4 channels, 4 images each.

    Psums 4 x 64 x 13 x 13 / 4 = 10 816 bind, 9 984 slides do not; 64 x 4 x 9 / 4 = 576 for filters, 500 between.
    """
    layer = conv_layer(256, 384, (13, 13), (3, 3), pads=(1,) * 4, batch=4, bias=False)
    found = price(layer, load_spec("eyeriss_12x14"), (4, 13, 16, 4, 1, 4, 64))
    assert found["array_cycles"] == 384 * (10_816 + 576 + 500)


def test_what_stays_on_chip_is_not_moved() -> None:
    """14 x 14 x 8 words are 49 bursts of 64 bytes; in two pieces of 4 channels, 25 each."""
    layer = conv_layer(8, 8, (14, 14), (3, 3), pads=(1,) * 4, bias=False)
    spec = load_spec("eyeriss_12x14")
    mapping = (1, 14, 8, 4, 1, 1, 8)
    there, here = (price(layer, spec, mapping, stay, stay, 0) for stay in (False, True))
    assert (there["input_bytes"], there["output_bytes"]) == (2 * 25 * 64, 49 * 64)
    assert here["input_bytes"] == here["output_bytes"] == 0
    assert here["array_cycles"] == there["array_cycles"] and here["cycles"] < there["cycles"]


def test_a_residual_is_loaded_like_the_result_is_stored() -> None:
    layer = conv_layer(8, 8, (14, 14), (3, 3), pads=(1,) * 4, bias=False)
    spec = load_spec("eyeriss_12x14")
    plain, summed = (
        price(replace(layer, residual=residual), spec, (1, 7, 8, 4, 1, 1, 8)) for residual in (False, True)
    )
    assert summed["residual_bytes"] == summed["output_bytes"] == plain["output_bytes"]
    assert summed["cycles"] >= plain["cycles"] and summed["channel_cycles"] > plain["channel_cycles"]


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        ((1, 13, 16, 4, 1, 5, 80), "more sets than the array"),
        ((1, 13, 16, 5, 1, 4, 64), "more words per element"),
        ((1, 13, 19, 4, 1, 4, 76), "more words per element"),
        ((1, 13, 24, 3, 1, 4, 96), None),
        ((1, 13, 25, 2, 1, 4, 100), "more words per element"),
        ((4, 13, 16, 4, 1, 4, 80), "partial sums and input"),
        ((1, 13, 16, 4, 2, 2, 32), None),
        ((1, 13, 18, 4, 4, 1, 18), None),
        ((1, 1, 18, 4, 12, 4, 72), "more filters per pass"),
        ((0, 13, 16, 4, 1, 4, 64), "n must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(mapping: tuple[int, ...], reason: str | None) -> None:
    """3x3 on 13x13: 4 sets of 3x13; 12 input words, 224 filter words, 24 psums; 4 096 filter words; 51 200 words."""
    layer = conv_layer(256, 384, (13, 13), (3, 3), pads=(1,) * 4, batch=4, bias=False)
    spec = load_spec("eyeriss_12x14")
    if reason is None:
        assert price(layer, spec, mapping)["cycles"] > 0
        return
    with pytest.raises(ValueError, match=reason):
        price(layer, spec, mapping)


@pytest.mark.parametrize(
    ("kernel_rows", "e", "sets"),
    [(3, 13, 4), (3, 7, 8), (11, 7, 2), (5, 27, 1), (5, 28, 1), (5, 29, 0), (1, 168, 1), (1, 1, 168), (12, 14, 1)],
)
def test_sets_fold_or_stand_side_by_side(kernel_rows: int, e: int, sets: int) -> None:
    """12 x 14 elements. The chip's own layers are among them: 3x13 four times, 11x7 twice, 5x27 folded in two."""
    assert most_sets(machine_record(load_spec("eyeriss_12x14"))[0], kernel_rows, e) == sets


def shape_of(layer: Layer, spec: MachineSpec | None = None) -> dict[str, int]:
    found = np.zeros(1, SHAPE)
    machine = machine_record(spec or load_spec("eyeriss_12x14"))[0]
    fill_shape(layer_table([layer.row()])[0], machine, found[0])
    return {name: int(found[0][name]) for name in SHAPE.names or ()}


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
def test_the_kernel_is_found_behind_its_dilation(kernel: tuple[int, ...], dilations: tuple[int, ...]) -> None:
    layer = conv_layer(2, 3, (13, 13, 13), kernel, dilations=dilations, bias=False)
    shape = shape_of(layer)
    assert shape["channels"] * shape["kernel_rows"] * shape["kernel_columns"] == 2 * prod(kernel)
    if max(dilations) == 1:
        assert (shape["kernel_rows"], shape["kernel_columns"]) == kernel[1:]
    assert shape["images"] == layer.out[0]


def test_what_an_element_cannot_hold_comes_in_pieces() -> None:
    """25 rows on 12 rows of elements: 3 pieces of 9; 25 words on 12: 3 pieces of 9. A matrix product is images of 1."""
    shape = shape_of(conv_layer(2, 3, (40, 40), (25, 25), bias=False))
    assert (shape["kernel_rows"], shape["kernel_columns"], shape["channels"]) == (9, 9, 2 * 9)
    product_shape = shape_of(gemm_layer(7, 20, 30))
    assert [product_shape[name] for name in ("images", "channels", "filters", "rows")] == [7, 20, 30, 1]
