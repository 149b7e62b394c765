"""Convolutions by hand: values against torch in float64, costs against the price list for the same tiling."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from accel_sim.energy import layer_energy_pj
from accel_sim.engine import Result, run
from accel_sim.pricing.candidate import FILTERS_FIRST, POSITIONS_FIRST, PRICE
from accel_sim.pricing.layer import conv_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.search import price_tilings
from accel_sim.pricing.tiling import IMAGES, ROWS
from accel_sim.program.isa import Dataflow
from accel_sim.spec import MachineSpec
from accel_sim.spec_file import load_spec
from tests.accel_sim.engine.conv_programs import SUM, Conv, write


def machine(rows: int = 16, columns: int = 16, buffers: int = 2) -> MachineSpec:
    """The default machine with every data flow, another array, and room for any tile of these tests."""
    spec = load_spec("edge_16x16")
    array = replace(spec.array, rows=rows, columns=columns, dataflows=("ws", "os", "is"))
    pads = replace(spec.scratchpads, input_kib=1024, accumulator_kib=1024, double_buffered=buffers == 2)
    return replace(spec, array=array, scratchpads=pads)


def reference(
    conv: Conv, x: NDArray[np.generic], weight: NDArray[np.int8], bias: NDArray[np.int32], r: NDArray[np.int8]
) -> NDArray[np.int8]:
    """Exact sums in float64, then one product in float32; x is (samples, batch, channels, axes...)."""
    flat = torch.from_numpy(x.reshape(-1, *x.shape[2:]).astype(np.float64))
    pads = [pad for axis in (2, 1, 0) for pad in (conv.pads[0][axis], conv.pads[1][axis])]
    padded = torch.nn.functional.pad(flat, pads, value=float(conv.pad_value))
    added = torch.from_numpy(bias.astype(np.float64)) if conv.bias else None
    sums = torch.nn.functional.conv3d(
        padded, torch.from_numpy(weight.astype(np.float64)), added, stride=conv.strides, dilation=conv.dilations
    ).numpy()
    scales = np.array([np.float32(conv.scale * (1 + 0.01 * f)) for f in range(conv.filters)], np.float32)
    scaled = np.rint(sums.astype(np.float32) * scales[:, None, None, None]) + conv.zero
    q = np.clip(scaled, -128, 127).reshape(*x.shape[:2], *sums.shape[1:])
    if conv.residual:
        inner = (r * np.float64(SUM.other_ratio) + SUM.offset).astype(np.float32)
        q = np.clip(np.rint((q * np.float64(SUM.own_ratio) + inner).astype(np.float32)), -128, 127)
    return q.astype(np.int8)


def check(conv: Conv, spec: MachineSpec, samples: int = 2, seed: int = 0, different: int = 20) -> Result:
    """Runs the convolution with the hazards watched, and compares all its values."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-128, 128, (conv.filters, conv.channels, *conv.kernel)).astype(np.int8)
    bias = rng.integers(-(1 << 16), 1 << 16, conv.filters).astype(np.int32)
    low, high, dtype = (-128, 128, np.int8) if conv.signed else (0, 256, np.uint8)
    x = rng.integers(low, high, (samples, conv.batch, conv.channels, *conv.size)).astype(dtype)
    r = rng.integers(-128, 128, (samples, conv.batch, conv.filters, *conv.out)).astype(np.int8)
    inputs: dict[str, NDArray[np.generic]] = {"x": x, "r": r} if conv.residual else {"x": x}
    result = run(write(conv, spec, weight, bias), spec, inputs)
    expected = reference(conv, x, weight, bias, r)
    assert len(np.unique(expected)) >= different, "the case shows little"
    np.testing.assert_array_equal(result.outputs["y"], expected)
    return result


BASE = Conv(24, 40, (1, 9, 8), (1, 3, 3), pads=((0, 1, 1), (0, 1, 1)), scale=2.0**-12)

CASES = {
    "plain": BASE,
    "channels in two steps, filters in three tiles, rows in three": replace(BASE, rows=4),
    "filters first": replace(BASE, rows=4, filters_first=True),
    "padding reads the zero point": replace(BASE, rows=3, pad_value=-100),
    "unsigned": replace(BASE, rows=4, signed=False, pad_value=200),
    "stride": replace(BASE, rows=2, strides=(1, 2, 2)),
    "stride beyond the kernel": replace(BASE, rows=2, strides=(1, 4, 3), kernel=(1, 2, 1), pads=((0, 0, 0), (0, 0, 0))),
    "dilation": replace(BASE, rows=3, dilations=(1, 2, 3), pads=((0, 2, 3), (0, 1, 4))),
    "padding at one side": replace(BASE, rows=4, pads=((0, 2, 0), (0, 0, 2))),
    "one axis": replace(BASE, size=(1, 1, 50), kernel=(1, 1, 5), pads=((0, 0, 2), (0, 0, 2))),
    "three axes": replace(BASE, size=(4, 5, 6), kernel=(2, 3, 2), strides=(1, 2, 1), pads=((1, 1, 0), (0, 1, 1))),
    "no axis: a matrix, images as its rows": replace(
        BASE, size=(1, 1, 1), kernel=(1, 1, 1), pads=((0, 0, 0), (0, 0, 0)), batch=7, images=3, scale=2.0**-9
    ),
    "images of a batch": replace(BASE, batch=3, images=2),
    "one block, narrower than the array": replace(BASE, channels=5, filters=3, scale=2.0**-10),
    "a last block of one channel": replace(BASE, channels=17, filters=33, rows=5),
    "no bias": replace(BASE, bias=False),
    "residual": replace(BASE, rows=4, residual=True),
    "residual, images": replace(BASE, batch=3, images=2, residual=True, tile_filters=32),
    "wide tiles": replace(BASE, tile_channels=32, tile_filters=48),
    "sums longer than float32 is exact for": replace(
        BASE, channels=640, filters=8, size=(1, 4, 4), tile_channels=640, scale=2.0**-14
    ),
    "unsigned sums as long": replace(
        BASE, channels=300, filters=8, size=(1, 4, 4), tile_channels=304, signed=False, scale=2.0**-15
    ),
}


@pytest.mark.parametrize("dataflow", Dataflow)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, dataflow: Dataflow) -> None:
    check(replace(CASES[name], dataflow=dataflow), machine())


@pytest.mark.parametrize(("rows", "columns", "buffers"), [(8, 4, 2), (4, 32, 2), (16, 16, 1), (3, 5, 2)])
def test_values_on_other_machines(rows: int, columns: int, buffers: int) -> None:
    conv = replace(BASE, rows=4, tile_filters=2 * columns, tile_channels=2 * columns, residual=True)
    check(conv, machine(rows, columns, buffers))


def test_samples_are_independent_and_need_no_axis() -> None:
    conv, spec = replace(BASE, rows=4), machine()
    rng = np.random.default_rng(3)
    weight = rng.integers(-128, 128, (conv.filters, conv.channels, *conv.kernel)).astype(np.int8)
    program = write(conv, spec, weight, np.zeros(conv.filters, np.int32))
    x = rng.integers(-128, 128, (3, 1, conv.channels, *conv.size)).astype(np.int8)
    together = run(program, spec, {"x": x})
    assert together.outputs["y"].shape == (3, 1, conv.filters, *conv.out)
    for sample in range(3):
        alone = run(program, spec, {"x": x[sample]})
        assert alone.cycles == together.cycles
        np.testing.assert_array_equal(alone.outputs["y"], together.outputs["y"][sample])


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Conv, MachineSpec]:
    kernel = (1, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    size = (1, draw(st.integers(3, 9)), draw(st.integers(3, 9)))
    pad = (0, draw(st.integers(0, kernel[1] // 2)), draw(st.integers(0, kernel[2] // 2)))
    strides = (1, draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    columns = draw(st.sampled_from([4, 8]))
    rows = draw(st.sampled_from([4, 8]))
    channels, filters = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    plain = Conv(channels, filters, size, kernel, strides, pads=(pad, pad))
    conv = replace(
        plain,
        batch=draw(st.integers(1, 3)),
        rows=draw(st.integers(0, plain.out[1] - 1)),
        images=draw(st.integers(1, 2)),
        tile_filters=min(columns * draw(st.integers(1, 3)), filters),
        # Pieces of the channels are cut at the blocks of the layout.
        tile_channels=min(columns * draw(st.integers(1, 3)), channels),
        filters_first=draw(st.booleans()),
        dataflow=draw(st.sampled_from(list(Dataflow))),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
    )
    spec = machine(rows, columns, draw(st.integers(1, 2)))
    array = replace(spec.array, weight_shadow=draw(st.booleans()), drain_overlap=draw(st.booleans()))
    dram = replace(
        spec.dram,
        bytes_per_cycle=draw(st.floats(0.5, 40)),
        latency_cycles=draw(st.integers(0, 30)),
        burst_bytes=draw(st.sampled_from([1, 8, 64])),
        pipelined_requests=draw(st.booleans()),
    )
    return conv, replace(spec, array=array, dram=dram)


@settings(max_examples=150, deadline=None)
@given(tilings())
def test_a_tiled_layer_costs_what_the_price_list_says(drawn: tuple[Conv, MachineSpec]) -> None:
    """Cycles, bytes per memory, and so energy: those of ``price_tilings`` for the same tiling, exactly."""
    conv, spec = drawn
    layer = conv_layer(
        *(conv.channels, conv.filters, conv.size[1:], conv.kernel[1:], conv.strides[1:]),
        pads=(*conv.pads[0][1:], *conv.pads[1][1:]),
        batch=conv.batch,
        bias=conv.bias,
    )
    layer = replace(layer, residual=conv.residual)
    tiling = np.zeros(1, PRICE)
    tiling["dataflow"] = int(conv.dataflow)
    tiling["order"] = FILTERS_FIRST if conv.filters_first else POSITIONS_FIRST
    tiling["level"] = ROWS if conv.rows else IMAGES
    tiling["tile_size"] = conv.rows or conv.images
    tiling["tile_filters"], tiling["tile_channels"] = conv.tile_filters, conv.tile_channels
    tiling["pack"] = 1
    price = price_tilings(layer_table([layer.row()]), machine_record(spec), tiling)[0]

    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (conv.filters, conv.channels, *conv.kernel)).astype(np.int8)
    program = write(conv, spec, weight, np.zeros(conv.filters, np.int32))
    result = run(program, spec, {}, values=False)
    (found,) = result.layers
    assert result.cycles == price["cycles"]
    assert found.array_cycles == price["array_cycles"]
    counts = found.counts
    assert counts.dram_read_bytes == price["input_bytes"] + price["weight_bytes"] + price["residual_bytes"]
    assert counts.dram_write_bytes == price["output_bytes"]
    for name in ("scratchpad_read", "scratchpad_write", "accumulator_read", "accumulator_write"):
        assert getattr(counts, f"{name}_bytes") == price[f"{name}_bytes"], name
    assert result.energy_pj == pytest.approx(layer_energy_pj(spec, price, layer.macs), rel=1e-12)
    assert result.macs == layer.macs == conv.batch * prod(conv.out) * conv.filters * conv.channels * prod(conv.kernel)
    # No faster than the array at its peak, and than all bytes one after the other.
    assert result.cycles >= found.compute_bound_cycles
    assert result.cycles >= found.bandwidth_bound_cycles


@settings(max_examples=40, deadline=None)
@given(tilings(), st.integers(0, 1 << 16))
def test_values_of_random_tilings(drawn: tuple[Conv, MachineSpec], seed: int) -> None:
    """And no hazard in any of them."""
    conv, spec = drawn
    terms = conv.channels * prod(conv.kernel)
    check(replace(conv, scale=2.0 ** -round(6 + np.log2(terms) / 2)), spec, samples=3, seed=seed, different=2)
