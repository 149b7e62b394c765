"""Programs of one layer or one chain, for any tiling; their results by plain integer arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from accel_sim.energy import layer_energy_pj
from accel_sim.engine import Result, run
from accel_sim.pricing.candidate import PRICE
from accel_sim.pricing.candidates import list_candidates
from accel_sim.pricing.layer import Layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.price_list import LayerPrice
from accel_sim.pricing.search import price_tilings
from accel_sim.program.isa import Marker, Output, Program, Sum, Tensor
from accel_sim.spec import MachineSpec
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.layer import LayerTask, lower_layer
from codegen.asic_compile.transfers import WholeMap

X_ZERO, Y_ZERO = 3, -7
"""Zero points of a layer's input and output; a layer without a bias has an input without a zero point."""


@dataclass(frozen=True, eq=False)
class Values:
    """A layer's numbers: (batch, channels, d, h, w) in, (filters, channels of a group, taps) weights."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    residual: np.ndarray | None
    scales: np.ndarray
    kernel: tuple[int, int, int]
    dilations: tuple[int, int, int]


def random_values(layer: Layer, kernel: tuple[int, int, int], dilations: tuple[int, int, int], seed: int) -> Values:
    rng = np.random.default_rng(seed)
    filters = layer.filters * layer.groups

    def bytes_(*shape: int) -> np.ndarray:
        return rng.integers(-128, 128, shape).astype(np.int8)

    x = bytes_(layer.batch, layer.channels * layer.groups, *layer.size)
    weight = bytes_(filters, layer.channels, layer.taps)
    bias = rng.integers(-(1 << 16), 1 << 16, filters).astype(np.int32) if layer.bias else None
    residual = bytes_(layer.batch, filters, *layer.out) if layer.residual else None
    reach = 128 * 74 * (layer.channels * layer.taps) ** 0.5
    scales = (rng.uniform(0.5, 2.0, filters) * 64 / reach).astype(np.float32)
    return Values(x, weight, bias, residual, scales, kernel, dilations)


def zero_point(layer: Layer) -> int:
    return X_ZERO if layer.bias else 0


def accumulators(layer: Layer, values: Values) -> np.ndarray:
    """bias + sum of weight * (x - zero point), (batch, filters, *out), tap by tap."""
    size, out = layer.size, layer.out
    axes = list(zip(out, layer.stride, layer.reach, size, layer.pad, strict=True))
    pads = [(before, max((o - 1) * stride + reach - n - before, 0)) for o, stride, reach, n, before in axes]
    x = np.pad(values.x.astype(np.int64) - zero_point(layer), ((0, 0), (0, 0), *pads))
    total = np.zeros((layer.batch, layer.groups * layer.filters, *out), np.int64)
    for tap, at in enumerate(np.ndindex(*values.kernel)):
        begin = [a * d for a, d in zip(at, values.dilations, strict=True)]
        cut = [slice(b, b + (o - 1) * s + 1, s) for b, o, s in zip(begin, out, layer.stride, strict=True)]
        part = x[(slice(None), slice(None), *cut)].reshape(layer.batch, layer.groups, layer.channels, *out)
        weight = values.weight[:, :, tap].reshape(layer.groups, layer.filters, layer.channels).astype(np.int64)
        total += np.einsum("bgcdhw,gfc->bgfdhw", part, weight).reshape(total.shape)
    if values.bias is not None:
        total += values.bias.astype(np.int64)[:, None, None, None]
    return total


def expected(layer: Layer, values: Values) -> np.ndarray:
    """The layer's bytes, a residual added."""
    words = accumulators(layer, values).astype(np.int32).astype(np.float32)
    real = np.rint(words * values.scales[:, None, None, None])
    y = np.clip(real + Y_ZERO, -128, 127)
    if values.residual is not None:
        inner = np.float32(0.75) * values.residual.astype(np.float32) + np.float32(1.5)
        y = np.clip(np.rint(np.float32(0.5) * y.astype(np.float32) + inner), -128, 127)
    return y.astype(np.int8)


def tilings(layer: Layer, spec: MachineSpec, on_chip: tuple[bool, bool] = (False, False), kept: int = 0) -> Any:
    """All tilings that fit."""
    table = layer_table([layer.row(*on_chip, kept)])
    positions = max(prod(layer.out), layer.batch)
    prices, bounds = np.zeros(1 << 15, PRICE), np.zeros(1 << 15, np.int64)
    found = list_candidates(table[0], machine_record(spec)[0], *np.empty((4, positions), np.int64), prices, bounds)
    assert found >= 0
    return prices[:found]


def priced(
    layer: Layer, spec: MachineSpec, tiling: Any, on_chip: tuple[bool, bool] = (False, False), kept: int = 0
) -> LayerPrice:
    record = price_tilings(layer_table([layer.row(*on_chip, kept)]), machine_record(spec), np.array([tiling]))[0]
    return LayerPrice(layer, record, *on_chip, layer_energy_pj(spec, record, layer.macs))


def folded_bias(layer: Layer, values: Values) -> np.ndarray | None:
    """The input's zero point in the bias, as the compiler does it."""
    if values.bias is None:
        return None
    return values.bias - zero_point(layer) * values.weight.astype(np.int64).sum(axis=(1, 2)).astype(np.int32)


def chain_program(spec: MachineSpec, prices: list[LayerPrice], values: list[Values]) -> Program:
    """A chain of stages with the maps on chip that ``prices`` keep there; the last stage may have a residual."""
    builder = Builder(spec)
    layers = [price.layer for price in prices]
    pads = spec.scratchpads
    room = 1024 * (pads.input_kib + (pads.weight_kib if pads.shared_input_weight else 0))
    maps: list[WholeMap] = []
    for i, layer in enumerate([layers[0], *layers]):
        size, channels = (layer.size, layer.channels) if i == 0 else (layer.out, layer.filters)
        shape = (layer.batch, channels * layer.groups, size)
        if 0 < i < len(layers) and prices[i - 1].output_on_chip:
            count = prod(shape[:2]) * prod(size)
            maps.append(WholeMap(0 if i % 2 else room - count, *shape))
        else:
            maps.append(builder.place(*shape))
            role = "input" if i == 0 else ("output" if i == len(layers) else "internal")
            name = {"input": "x", "output": "y"}.get(role, f"t{i}")
            builder.tensors.append(Tensor(name, (*shape[:2], *size), maps[-1].address, 1.0, 0, True, role))
    last = layers[-1]
    residual = None
    if last.residual:
        residual = builder.place(last.batch, last.filters * last.groups, last.out)
        shape = (last.batch, last.filters * last.groups, *last.out)
        builder.tensors.append(Tensor("r", shape, residual.address, 1.0, 0, True, "input"))
    for i, (price, value) in enumerate(zip(prices, values, strict=True)):
        begin, end = 0, room
        for at, kept in ((i, price.input_on_chip), (i + 1, price.output_on_chip)):
            if kept and at % 2:
                begin = maps[at].bytes
            elif kept:
                end = maps[at].address
        builder.begin(Marker(f"layer {i}", "Conv", (), price.cycles, price.layer.macs))
        total = -1
        if price.layer.residual:
            total = builder.sums.number(Sum(0.5, 0.75, 1.5, -128, 127, True, True, True, True))
        output = Output(builder.scales(value.scales), True, Y_ZERO, -128, 127, True, sum=total)
        bias = folded_bias(price.layer, value)
        task = LayerTask(
            price, value.weight, bias, value.kernel, value.dilations, zero_point(price.layer), True,
            maps[i], maps[i + 1], residual if price.layer.residual else None,
            builder.outputs.number(output), begin, end,
        )  # fmt: skip
        lower_layer(builder, task)
    return builder.program()


def run_chain(
    spec: MachineSpec, prices: list[LayerPrice], values: list[Values]
) -> tuple[np.ndarray, np.ndarray, Result]:
    """(engine's bytes, expected bytes, engine's result) of a chain; each stage's input is what the one before gave."""
    program = chain_program(spec, prices, values)
    feeds = {"x": values[0].x}
    if values[-1].residual is not None:
        feeds["r"] = values[-1].residual
    result = run(program, spec, feeds)
    y = values[0].x
    for price, value in zip(prices, values, strict=True):
        y = expected(price.layer, replace(value, x=y))
    return result.outputs["y"], y, result


def layer_cycles(result: Result) -> list[int]:
    """The engine's cycles of each layer: from one barrier to the next."""
    return [int(cycles) for cycles in np.diff(result.schedule.barriers)]


def moved_bytes(result: Result) -> int:
    return int(result.schedule.columns.moved_bytes.sum())
