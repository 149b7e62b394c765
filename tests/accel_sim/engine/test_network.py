"""Whole programs: layers that keep maps on chip, host calls, what counts for what, and what comes of damage."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from accel_sim.energy import vector_energy_pj
from accel_sim.engine import HazardError, run
from accel_sim.pricing.candidate import PRICE
from accel_sim.pricing.layer import conv_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.search import price_tilings
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import (
    Halt,
    HostCall,
    Instruction,
    Load,
    Loops,
    Marker,
    Matmul,
    Output,
    Preload,
    Program,
    Store,
    Sync,
    Tensor,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
    Window,
)
from tests.accel_sim.engine.conv_programs import Conv, write
from tests.accel_sim.engine.step_programs import program_of
from tests.accel_sim.engine.test_conv import BASE, machine, reference
from tests.accel_sim.program.sample_programs import SPEC, one_tile, two_layers

FIRST = Conv(24, 20, (1, 6, 5), (1, 1, 1), tile_channels=24, tile_filters=20, scale=2.0**-10)
SECOND = Conv(20, 36, (1, 6, 5), (1, 3, 3), pads=((0, 1, 1), (0, 1, 1)), pad_value=3, bias=False, scale=2.0**-11)
MAP = 0x8000
"""Where the map between them stays in the scratchpad."""


def chain(weights: tuple[NDArray[np.int8], NDArray[np.int8]], bias: NDArray[np.int32]) -> Program:
    """Two convolutions, the map between them on chip: 20 channels in blocks of 16 and 4 at 30 positions."""
    constants = b"".join(
        (
            np.ascontiguousarray(weights[0].transpose(2, 3, 4, 1, 0)).tobytes(),
            bias.astype("<i4").tobytes(),
            *(np.ascontiguousarray(weights[1][f : f + 18].transpose(2, 3, 4, 1, 0)).tobytes() for f in (0, 18)),
        )
    )
    x_bytes, at = 24 * 30, 24 * 30 + 36 * 30
    first = 24 * 20 + 4 * 20
    piece = 9 * 20 * 18
    code: list[Instruction] = [
        Sync(0),
        Load(0, 0, Loops(x_bytes)),
        Load(at, 1024, Loops(first), chained=True, post=Token.LOADED),
        Preload(wait=Token.LOADED),
        Matmul(0, 0, 1024, 0, 24, 20, bias_address=1024 + 24 * 20, post=Token.COMPUTED),
        Store(MAP, 0, Loops(30 * 16), 16, 0, to_scratchpad=True, wait=Token.COMPUTED),
        Store(MAP + 480, 4 * 480, Loops(30 * 4), 4, 0, first_channel=16, to_scratchpad=True, chained=True),
        Sync(1),
    ]
    for tile in range(2):
        weight = 2048 + tile * 4096
        code += [
            Load(at + first + tile * piece, weight, Loops(piece), post=Token.LOADED),
            Preload(wait=Token.LOADED),
            Matmul(1, MAP, weight, tile * 8192, 20, 18, post=Token.COMPUTED),
        ]
        # Channels 18 to 35 of the tile's layout 16 + 2, into blocks that begin at 16 and 32.
        begin, end = tile * 18, tile * 18 + 18
        stores = []
        for low in (0, 16):
            for block in range(0, 36, 16):
                a, b = max(begin + low, block), min(begin + min(low + 16, 18), block + 16, end)
                if a >= b:
                    continue
                own, width = (16 if low == 0 else 2), min(16, 36 - block)
                offset = (low * 30 + (a - begin - low)) * 4
                stores.append(
                    Store(
                        x_bytes + block * 30 + a - block,
                        tile * 8192 + offset,
                        Loops(b - a, (1, 1, 30), (0, 0, width), (0, 0, own)),
                        lanes=b - a,
                        output=1,
                        first_channel=a,
                    )
                )
        code += [replace(s, chained=i > 0, wait=Token.NONE if i else Token.COMPUTED) for i, s in enumerate(stores)]
    scales = [float(np.float32(conv.scale * (1 + 0.01 * f))) for conv in (FIRST, SECOND) for f in range(conv.filters)]
    plain = Window(1, 24, (1, 6, 5), (1, 6, 5), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), 0, True)
    wide = Window(1, 20, (1, 6, 5), (1, 6, 5), (1, 3, 3), (1, 1, 1), (1, 1, 1), (0, -1, -1), 3, True)
    return Program(
        spec_hash=b"",
        columns=16,
        code=(*code, Halt()),
        windows=(plain, wide),
        outputs=(Output(0, True, 3, -128, 127, True), Output(20, True, 3, -128, 127, True)),
        sums=(),
        vectors=(),
        scales=tuple(scales),
        tables=(),
        tensors=(
            Tensor("x", (1, 24, 1, 6, 5), 0, 1.0, 0, True, "input"),
            Tensor("y", (1, 36, 1, 6, 5), x_bytes, 1.0, 3, True, "output"),
        ),
        markers=(Marker("first", "Conv", macs=24 * 20 * 30), Marker("second", "Conv", macs=20 * 36 * 9 * 30)),
        calls=(),
        constants=constants,
        constants_address=at,
        dram_bytes=at + len(constants),
    )


def test_a_map_that_stays_on_chip() -> None:
    """Values of both layers; the first one's cycles and counts are the price list's for a result on chip."""
    spec = machine()
    rng = np.random.default_rng(0)
    weights = (
        rng.integers(-128, 128, (20, 24, 1, 1, 1)).astype(np.int8),
        rng.integers(-128, 128, (36, 20, 1, 3, 3)).astype(np.int8),
    )
    bias = rng.integers(-(1 << 12), 1 << 12, 20).astype(np.int32)
    x = rng.integers(-128, 128, (3, 1, 24, 1, 6, 5)).astype(np.int8)
    none = np.zeros(0, np.int8)
    between = reference(FIRST, x, weights[0], bias, none)
    expected = reference(SECOND, between, weights[1], np.zeros(36, np.int32), none)
    result = run(chain(weights, bias), spec, {"x": x}, audit=True)
    np.testing.assert_array_equal(result.outputs["y"], expected)
    assert len(np.unique(expected)) > 20
    assert result.audit is not None
    assert (result.audit.unused_bytes, result.audit.unwritten_bytes, result.audit.rewritten_bytes) == (0, 0, 0)
    assert result.audit.output_bytes == 36 * 30

    tiling = np.zeros(1, PRICE)
    tiling["tile_size"], tiling["pack"] = 1, 1
    tiling["tile_filters"], tiling["tile_channels"] = 20, 24
    layer = conv_layer(24, 20, (6, 5), (1, 1))
    price = price_tilings(layer_table([layer.row(output_on_chip=True)]), machine_record(spec), tiling)[0]
    first = result.layers[0]
    assert first.cycles == price["cycles"]
    assert first.counts.dram_bytes == price["input_bytes"] + price["weight_bytes"]
    for name in ("scratchpad_read", "scratchpad_write", "accumulator_read", "accumulator_write"):
        assert getattr(first.counts, f"{name}_bytes") == price[f"{name}_bytes"], name
    assert first.activities["store"]["busy"] == 30 * 2  # positions x blocks


def test_an_operation_of_the_vector_unit_costs_what_the_price_list_says() -> None:
    """Sizes in whole bursts, where the list's bytes (moved) and the engine's (used) are the same."""
    code: list[Instruction] = [
        Load(0, 0, Loops(1024)),
        Load(1024, 1024, Loops(1024), chained=True, post=Token.LOADED),
        Vector(0, 0, 0, 1024, 2048, b_address=1024, wait=Token.LOADED, post=Token.COMPUTED),
        Store(2048, 0, Loops(1024), 16, wait=Token.COMPUTED),
        Halt(),
    ]
    program = replace(program_of(code), vectors=(VectorSpec(VectorFunction.PRODUCT),), dram_bytes=4096)
    result = run(program, SPEC, {}, values=False)
    assert result.energy_pj == pytest.approx(vector_energy_pj(SPEC, result.cycles, 3072, 2048), rel=1e-12)
    assert result.counts.vector_operations == 2048
    assert result.layers[0].vector_cycles == 2048 // SPEC.vector.lanes
    assert result.layers[0].array_cycles == 0


def test_host_calls_see_and_leave_real_values_and_are_estimated_apart() -> None:
    program = two_layers()
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.integers(-128, 128, (3, 1, 32, 8, 8)).astype(np.int8),
        "r": rng.integers(-128, 128, (3, 1, 16, 8, 8)).astype(np.int8),
    }
    seen: list[NDArray[np.float32]] = []

    def host(call: HostCall, tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        assert call is program.calls[0]
        assert {name: data.shape for name, data in tensors.items()} == {"p": (1, 16)}
        seen.append(tensors["p"])
        return {"q": np.linspace(-1, 2, 16, dtype=np.float32).reshape(1, 16)}

    result = run(program, SPEC, inputs, host=host)
    assert len(seen) == 3
    for values in seen:
        integers = values / np.float32(0.125) - 1
        np.testing.assert_array_equal(integers, np.rint(integers))
    expected = np.clip(np.rint(np.linspace(-1, 2, 16, dtype=np.float32) * 256) - 128, -128, 127)
    np.testing.assert_array_equal(result.outputs["q"], np.tile(expected, (3, 1, 1)))
    assert result.layers[1].host_calls == (0,)
    assert result.host_cycles == SPEC.host.call_cycles + 32 * SPEC.host.element_cycles
    assert result.cycles == run(program, SPEC, {}, values=False).cycles
    with pytest.raises(ValueError, match="host function"):
        run(program, SPEC, inputs)


def test_conservation_in_a_tiled_layer() -> None:
    """Each byte that is loaded is used, each of the output is written once; a piece too many of either is seen."""
    spec = machine()
    conv = replace(BASE, rows=4, residual=True)
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (conv.filters, conv.channels, *conv.kernel)).astype(np.int8)
    program = write(conv, spec, weight, np.zeros(conv.filters, np.int32))
    inputs = {
        "x": rng.integers(-128, 128, (1, conv.channels, *conv.size)).astype(np.int8),
        "r": rng.integers(-128, 128, (1, conv.filters, *conv.out)).astype(np.int8),
    }
    audit = run(program, spec, inputs, audit=True).audit
    assert audit is not None
    payload = run(program, spec, {}, values=False).schedule.columns
    loads = [isinstance(one, Load) for one in program.code]
    assert audit.loaded_bytes == payload.payload_bytes[loads].sum()
    assert (audit.unused_bytes, audit.unwritten_bytes, audit.rewritten_bytes) == (0, 0, 0)
    assert audit.output_bytes == conv.filters * int(np.prod(conv.out))

    at = next(i for i, one in enumerate(program.code) if isinstance(one, Store))
    store = program.code[at]
    assert isinstance(store, Store)
    twice = (replace(store, post=Token.NONE), replace(store, chained=True, wait=Token.NONE))
    again = (*program.code[:at], *twice, *program.code[at + 1 :])
    more = replace(program, code=(Sync(0), Load(0, 900_000, Loops(100)), Load(0, 900_000, Loops(40)), *again))
    audit = run(more, spec, inputs, audit=True).audit
    assert audit is not None
    assert audit.unused_bytes == 140
    assert audit.rewritten_bytes == store.loops.run * int(np.prod(store.loops.counts))


def test_inputs_of_another_kind_are_refused() -> None:
    program = one_tile()
    good = np.zeros((1, 8, 4, 4), np.int8)
    for inputs, said in (
        ({}, "expected"),
        ({"x": good, "z": good}, "expected"),
        ({"x": good.astype(np.uint8)}, "uint8"),
        ({"x": good[:, :4]}, "shape"),
        ({"x": good[None, None]}, "axis of samples"),
        ({"x": good[None][:0]}, "at least one"),
    ):
        with pytest.raises(ValueError, match=said):
            run(program, SPEC, inputs)
    wide = replace(SPEC, datatypes=replace(SPEC.datatypes, data_bits=16))
    with pytest.raises(ValueError, match="8-bit"):
        run(program, wide, {"x": good})


def mutate(program: Program, rng: random.Random) -> Program:
    """One number of one instruction or descriptor becomes another one."""
    parts = ("code", "code", "code", "windows", "outputs", "vectors")
    part = rng.choice([name for name in parts if getattr(program, name)])
    entries = list(getattr(program, part))
    at = rng.randrange(len(entries))
    entries[at] = changed(entries[at], rng)
    return replace(program, **{part: tuple(entries)})


def changed(entry: Any, rng: random.Random) -> Any:
    names = [field.name for field in fields(entry)]
    if not names:
        return entry
    name = rng.choice(names)
    value = getattr(entry, name)
    if isinstance(value, Loops):
        return replace(entry, **{name: changed(value, rng)})
    if isinstance(value, tuple):
        place = rng.randrange(len(value))
        return replace(entry, **{name: (*value[:place], number(value[place], rng), *value[place + 1 :])})
    if isinstance(value, bool):
        return replace(entry, **{name: not value})
    if isinstance(value, int):
        kind = type(value)
        return entry if kind not in (int,) else replace(entry, **{name: number(value, rng)})
    return entry


def number(value: int, rng: random.Random) -> int:
    return rng.choice((value ^ (1 << rng.randrange(12)), -value, value + 1, value - 1, 0, -1, 1 << 20))


@pytest.mark.parametrize("seed", range(120))
def test_damage_gives_an_error_of_its_own_or_a_result(seed: int) -> None:
    """Never an error of NumPy's, and never a read beyond a memory."""
    rng = random.Random(seed)
    program = mutate(one_tile() if seed % 2 else two_layers(), rng)
    shapes = {tensor.name: tensor.shape for tensor in program.tensors if tensor.role == "input"}
    inputs = {name: np.ones(shape, np.int8) for name, shape in shapes.items()}

    def host(call: HostCall, tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        return {name: np.zeros((1, 16), np.float32) for name in call.outputs}

    try:
        run(program, SPEC, inputs, host=host)
    except ProgramError as error:
        assert isinstance(error, HazardError) or error.index is not None


@pytest.mark.parametrize("constant", ["neither", "left", "right"])
def test_products_of_two_activations(constant: str) -> None:
    """M x K times K x N where either operand may differ between the samples, or lie among the constants."""
    m, k, n = 6, 16, 10
    rng = np.random.default_rng(0)
    left = rng.integers(-128, 128, (3, m, k)).astype(np.int8)
    right = rng.integers(-128, 128, (3, k, n)).astype(np.int8)
    if constant == "left":
        left[:] = left[0]
    if constant == "right":
        right[:] = right[0]
    code: list[Instruction] = [
        Load(0, 0, Loops(m * k)),
        Load(m * k, 1024, Loops(k * n), chained=True, post=Token.LOADED),
        Preload(wait=Token.LOADED),
        Matmul(0, 0, 1024, 0, k, n, post=Token.COMPUTED),
        Store(m * k + k * n, 0, Loops(m * n), n, 0, wait=Token.COMPUTED),
        Halt(),
    ]
    # Rows are images of one pixel; K x N lies row after row, as K images of N channels.
    tensors = (
        Tensor("left", (m, k), 0, 1.0, 0, True, "input"),
        Tensor("right", (k, n), m * k, 1.0, 0, True, "input"),
        Tensor("y", (1, n, m), m * k + k * n, 1.0, 0, True, "output"),
    )
    constants = {"neither": b"", "left": left[0].tobytes(), "right": right[0].tobytes()}[constant]
    program = replace(
        program_of(code),
        windows=(Window(m, k, (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), 0, True),),
        outputs=(Output(0, False, 0, -128, 127, True),),
        scales=(2.0**-9,),
        tensors=tuple(tensor for tensor in tensors if tensor.name != constant),
        constants=constants,
        constants_address=m * k if constant == "right" else 0,
        dram_bytes=m * k + k * n + m * n,
    )
    inputs = {name: data for name, data in (("left", left), ("right", right)) if name != constant}
    found = run(program, SPEC, inputs).outputs["y"]
    exact = left.astype(np.int64) @ right.astype(np.int64)
    expected = np.clip(np.rint(exact.astype(np.float32) * np.float32(2.0**-9)), -128, 127)
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(found[:, 0].swapaxes(1, 2), expected)
