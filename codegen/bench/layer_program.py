"""Programs of single layers, to time: their shapes and tilings count, their weights are zeros."""

from __future__ import annotations

import numpy as np

from accel_sim.pricing.price_list import LayerPrice
from accel_sim.program.isa import Marker, Output, Program, Tensor
from accel_sim.spec import MachineSpec
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.layer import LayerTask, lower_layer


def layer_program(price: LayerPrice, kernel: tuple[int, int, int], spec: MachineSpec) -> Program:
    """``price``'s layer with its tiling, map to map in DRAM; no bias. ``kernel`` is (depth, height, width)."""
    layer = price.layer
    builder = Builder(spec)
    shapes = (
        (layer.batch, layer.channels * layer.groups, layer.size),
        (layer.batch, layer.filters * layer.groups, layer.out),
    )
    source, target = (builder.place(*shape) for shape in shapes)
    for name, role, place, (batch, channels, size) in zip(
        "xy", ("input", "output"), (source, target), shapes, strict=True
    ):
        builder.tensors.append(Tensor(name, (batch, channels, *size), place.address, 1.0, 0, True, role))
    filters = layer.filters * layer.groups
    builder.begin(Marker("layer", "Conv", (), price.cycles, layer.macs))
    scales = builder.scales(np.ones(filters, np.float32))
    pads = spec.scratchpads
    task = LayerTask(
        price=price,
        weight=np.zeros((filters, layer.channels, layer.taps), np.int8),
        bias=None,
        kernel=kernel,
        dilations=(1, 1, 1),
        pad_value=0,
        signed=True,
        input=source,
        output=target,
        residual=None,
        output_entry=builder.outputs.number(Output(scales, True, 0, -128, 127, True, sum=-1)),
        input_begin=0,
        input_end=1024 * (pads.input_kib + (pads.weight_kib if pads.shared_input_weight else 0)),
    )
    lower_layer(builder, task)
    return builder.program()
