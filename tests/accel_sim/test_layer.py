"""Layers as GEMMs: sizes, MACs and, for transposed convolutions, the phases, against brute force and torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.pricing.layer import LAYER, Layer, conv_layer, gemm_layer, layer_table, transposed_conv_layer

AXIS = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=100, deadline=None)
@given(st.lists(AXIS, min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 2))
def test_convolutions_have_torchs_sizes(axes: list[tuple[int, ...]], groups: int, batch: int) -> None:
    n = len(axes)
    kernel, strides, dilations, pads = ([axis[i] for axis in axes] for i in range(4))
    spatial = [(k - 1) * d + 1 + axis[4] for k, d, axis in zip(kernel, dilations, axes, strict=True)]
    layer = conv_layer(groups * 2, groups * 3, spatial, kernel, strides, dilations, pads * 2, groups, batch)
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[n - 1]
    image = torch.zeros(batch, groups * 2, *spatial)
    out = conv(image, torch.zeros(groups * 3, 2, *kernel), None, strides, pads, dilations, groups)
    assert layer.out[3 - n :] == tuple(out.shape[2:])
    assert layer.output_elements == out.numel()
    assert layer.input_elements == image.numel()
    assert layer.macs == out.numel() * 2 * prod(kernel)
    assert (layer.channels, layer.filters, layer.taps) == (2, 3, prod(kernel))


def _phases(k: int, s: int, d: int, pad: int, size: int, out: int) -> tuple[int, int, int]:
    """Per axis by brute force: most taps in a phase, and the span of inputs around output o // s (begin, end)."""
    taps: dict[int, set[int]] = {p: set() for p in range(s)}
    begin, end = 99, -99
    for i, t in product(range(-9, size + 9), range(k)):  # beyond the input too: padding is part of the span
        o = i * s + d * t - pad
        if 0 <= o < out:
            taps[o % s].add(t)
            begin, end = min(begin, i - o // s), max(end, i - o // s)
    return max(map(len, taps.values())), begin, end


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.integers(3, 6))
def test_a_transposed_convolution_is_its_phases(k: int, s: int, d: int, pad: int, extra: int, size: int) -> None:
    extra = min(extra, s - 1)
    out = (size - 1) * s + d * (k - 1) + 1 - 2 * pad + extra
    if out < s or extra >= max(s, d):
        return
    torch_out = torch.nn.functional.conv_transpose1d(
        torch.zeros(2, 4, size), torch.zeros(4, 3, k), None, s, pad, extra, 1, d
    )
    assert torch_out.shape[2] == out
    layer = transposed_conv_layer(4, 3, (size,), (out,), (k,), (s,), (d,), (pad, pad - extra), batch=2)
    taps, begin, end = _phases(k, s, d, pad, size, out)
    assert layer.taps == taps
    assert (-layer.pad[2], layer.reach[2] - 1 - layer.pad[2]) == (begin, end)
    assert layer.out[2] * s >= out > (layer.out[2] - 1) * s
    assert layer.filters == 3 * s
    assert layer.macs == 2 * size * 4 * 3 * k
    assert layer.output_elements == torch_out.numel()


def test_no_waste_where_the_stride_divides_the_kernel() -> None:
    """4x4 with stride 2: each of the 4 phases has 4 of the 16 taps; a 3x3 one with stride 2 fills 9 up to 16."""
    even = transposed_conv_layer(8, 8, (10, 10), (20, 20), (4, 4), (2, 2), (1, 1), (1, 1, 1, 1))
    assert (even.taps, even.filters, even.out) == (4, 32, (1, 10, 10))
    assert prod(even.out) * even.channels * even.taps * even.filters == even.macs
    odd = transposed_conv_layer(8, 8, (10, 10), (20, 20), (3, 3), (2, 2), (1, 1), (1, 1, 0, 0))
    assert prod(odd.out) * odd.channels * odd.taps * odd.filters * 9 == odd.macs * 16


def test_a_gemm_is_a_batch_of_single_pixels() -> None:
    assert gemm_layer(5, 7, 3) == conv_layer(7, 3, (), (), batch=5, bias=False)
    assert gemm_layer(5, 7, 3).macs == 105


def test_rows_carry_every_field() -> None:
    layer = conv_layer(4, 6, (9, 8), (3, 2), (2, 1), (1, 2), (1, 0, 1, 0), 2, 5)
    row = layer_table([layer.row(True, True, 77)])[0]
    read = {name: int(row[name]) for name in LAYER.names or ()}
    assert read == {
        **{"batch": 5, "groups": 2, "channels": 2, "filters": 3, "taps": 6, "bias": 1},
        **{"out_d": 1, "out_h": 5, "out_w": 6, "in_d": 1, "in_h": 9, "in_w": 8},
        **{"stride_d": 1, "stride_h": 2, "stride_w": 1, "reach_d": 1, "reach_h": 3, "reach_w": 3},
        **{"pad_d": 0, "pad_h": 1, "pad_w": 0, "macs": layer.macs},
        **{"input_on_chip": 1, "output_on_chip": 1, "reserved_bytes": 77, "residual": 0},
    }
    assert layer_table([replace(layer, residual=True).row()])[0]["residual"] == 1
    assert isinstance(layer, Layer)


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 groups"):
        conv_layer(4, 6, (9,), (3,), groups=3)
    with pytest.raises(ValueError, match="at most 3"):
        conv_layer(4, 4, (5,) * 4, (1,) * 4)
    with pytest.raises(ValueError, match="has no output"):
        conv_layer(4, 4, (2,), (3,))
