"""The vector unit and the way out of the accumulators: every byte against formulas in Python, or torch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from accel_sim.engine import run
from accel_sim.engine.layout import pack_map
from accel_sim.engine.output import add, requantize
from accel_sim.engine.vector import element_wise, pool
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import (
    Halt,
    Load,
    Loops,
    Output,
    Program,
    Sum,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
    Window,
)
from accel_sim.spec_file import load_spec
from tests.accel_sim.engine.step_programs import program_of

BYTES = np.arange(256, dtype=np.uint8)
A, B = (grid.reshape(1, -1) for grid in np.meshgrid(BYTES, BYTES))
"""All pairs of bytes, (1, 65536)."""


def integers(values: NDArray[np.uint8], signed: bool) -> list[int]:
    return (values.view(np.int8) if signed else values).reshape(-1).tolist()


def to_float32(exact: Fraction) -> np.float32:
    """Rounded once, half to even: of the two neighbours of a first guess the nearest one."""
    guess = np.float32(float(exact))
    near = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    return min(near, key=lambda one: (abs(Fraction(float(one)) - exact), int(one.view(np.int32)) & 1))


def clamp(value: float, low: int, high: int) -> int:
    return int(min(max(value, low), high))


def half_even(value: np.float32) -> int:
    return round(float(value))


@pytest.mark.parametrize("own_first", [True, False])
@pytest.mark.parametrize("signs", [(True, True, True), (False, True, False), (True, False, True)])
def test_sums_are_two_fused_products(own_first: bool, signs: tuple[bool, bool, bool]) -> None:
    own, other, result = signs
    low, high = (-100, 120) if result else (3, 250)
    how = Sum(
        float(np.float32(0.7312)), float(np.float32(0.4177)), float(np.float32(1.7)), low, high, own_first, *signs
    )
    found = add(A, B, how).reshape(-1)[::97]
    ratios = (Fraction(how.own_ratio), Fraction(how.other_ratio))
    for q, r, y in zip(integers(A, own)[::97], integers(B, other)[::97], integers(found, result), strict=True):
        first, second = ((q, ratios[0]), (r, ratios[1])) if own_first else ((r, ratios[1]), (q, ratios[0]))
        inner = to_float32(second[0] * second[1] + Fraction(how.offset))
        assert y == clamp(half_even(to_float32(first[0] * first[1] + Fraction(float(inner)))), low, high)


def test_words_become_bytes() -> None:
    """Ties to even, the ends of the range, words that float32 does not hold."""
    words = np.array([[0, 1, 3, 5, -1, -3, 2**31 - 1, -(2**31), 2**24 + 1, 255, -257]], np.int32)
    output = Output(0, False, 7, -120, 111, True)
    found = requantize(words, np.ones(1, np.float32) / 2, output)
    expected = [clamp(half_even(np.float32(word) * np.float32(0.5)) + 7, -120, 111) for word in words[0].tolist()]
    assert integers(found, True) == expected
    assert expected[:6] == [7, 7, 9, 9, 7, 5]
    unsigned = requantize(words, np.ones(1, np.float32) / 2, Output(0, False, 128, 0, 255, False))
    assert integers(unsigned, False) == [clamp(half_even(np.float32(w) / 2) + 128, 0, 255) for w in words[0].tolist()]


def vectors(spec: VectorSpec, sums: tuple[Sum, ...] = (), tables: tuple[bytes, ...] = ()) -> Program:
    program = program_of([Halt()])
    return Program(**{**program.__dict__, "vectors": (spec,), "sums": sums, "tables": tables})


@pytest.mark.parametrize("signed", [True, False])
def test_products(signed: bool) -> None:
    ratio = float(np.float32(0.01234))
    low, high = (-128, 127) if signed else (0, 255)
    spec = VectorSpec(
        VectorFunction.PRODUCT, ratio=ratio, a_zero=3, b_zero=-7, zero_point=11, low=low, high=high, signed=signed
    )
    found = integers(element_wise(vectors(spec), spec, A, B), signed)[::53]
    for a, b, y in zip(integers(A, signed)[::53], integers(B, signed)[::53], found, strict=True):
        scaled = to_float32(Fraction((a - 3) * (b + 7)) * Fraction(ratio))
        assert y == clamp(half_even(to_float32(Fraction(float(scaled)) + 11)), low, high)


def test_tables_and_copies() -> None:
    table = bytes(np.random.default_rng(0).permutation(256).astype(np.uint8))
    spec = VectorSpec(VectorFunction.TABLE, table=0)
    assert element_wise(vectors(spec, tables=(table,)), spec, BYTES[None], None).tobytes() == table
    copy = VectorSpec(VectorFunction.COPY)
    assert element_wise(vectors(copy), copy, BYTES[None], None).tobytes() == bytes(range(256))


WINDOWS = {
    "plain": ((1, 6, 8), (1, 2, 2), (1, 2, 2), (1, 1, 1), (0, 0, 0), (0, 0, 0)),
    "overlapping, padded": ((1, 7, 6), (1, 3, 3), (1, 2, 1), (1, 1, 1), (0, 1, 1), (0, 1, 1)),
    "three axes": ((4, 5, 6), (2, 3, 2), (2, 1, 2), (1, 1, 1), (0, 1, 0), (0, 1, 0)),
    "global": ((1, 5, 7), (1, 5, 7), (1, 1, 1), (1, 1, 1), (0, 0, 0), (0, 0, 0)),
    "dilated": ((1, 8, 9), (1, 2, 3), (1, 1, 1), (1, 3, 2), (0, 0, 0), (0, 0, 0)),
}


def pooled(name: str, pad_value: int, signed: bool) -> tuple[Window, NDArray[np.generic]]:
    """Twenty channels in blocks of 16 and 4, two images; the window, and three samples of the map."""
    size, kernel, strides, dilations, begin, end = WINDOWS[name]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    out = [(s + b + e - r) // t + 1 for s, b, e, r, t in zip(size, begin, end, reach, strides, strict=True)]
    window = Window(
        *(2, 20, size, (out[0], out[1], out[2]), kernel, strides, dilations),
        *((-begin[0], -begin[1], -begin[2]), pad_value, signed),
    )
    low, high = (-128, 128) if signed else (0, 256)
    x = np.random.default_rng(1).integers(low, high, (3, 2, 20, *size)).astype(np.int8 if signed else np.uint8)
    return window, x


def as_maps(result: NDArray[np.uint8], window: Window, signed: bool) -> NDArray[np.generic]:
    from accel_sim.engine.layout import unpack_map

    return unpack_map(result, (2, 20, *window.out), 16, signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_greatest_values(name: str, signed: bool) -> None:
    window, x = pooled(name, -128 if signed else 0, signed)
    spec = VectorSpec(VectorFunction.MAX_POOL, signed=signed)
    found = as_maps(pool(pack_map(x, (2, 20, *window.extent), 16), spec, window, 16), window, signed)
    flat = torch.from_numpy(x.reshape(6, *x.shape[2:]).astype(np.float64))
    pads = tuple(-begin for begin in window.origin)
    expected = torch.nn.functional.max_pool3d(flat, window.kernel, window.strides, pads, window.dilations)
    np.testing.assert_array_equal(found.reshape(6, 20, *window.out), expected.numpy())


@pytest.mark.parametrize("count_padding", [True, False])
@pytest.mark.parametrize("name", [name for name in WINDOWS if name != "dilated"])
def test_averages(name: str, count_padding: bool) -> None:
    window, x = pooled(name, 5, True)
    ratio, divisor = float(np.float32(0.031)), float(np.float32(0.0213))
    spec = VectorSpec(
        VectorFunction.AVERAGE_POOL, ratio=ratio, divisor=divisor, a_zero=5, zero_point=-9, count_padding=count_padding
    )
    found = as_maps(pool(pack_map(x, (2, 20, *window.extent), 16), spec, window, 16), window, True)
    flat = torch.from_numpy(x.reshape(6, *x.shape[2:]).astype(np.float64) - 5)
    pads = tuple(-begin for begin in window.origin)
    taps = int(np.prod(window.kernel))
    sums = torch.nn.functional.avg_pool3d(flat, window.kernel, window.strides, pads, divisor_override=1).numpy()
    ones = torch.ones(1, 1, *window.extent, dtype=torch.float64)
    inside = torch.nn.functional.avg_pool3d(ones, window.kernel, window.strides, pads, divisor_override=1).numpy()
    count = np.full_like(inside, taps) if count_padding else inside
    multiplier = np.float32(ratio) / (np.float32(divisor) * count.astype(np.float32))
    expected = np.clip(np.rint(np.rint(sums).astype(np.float32) * multiplier) - 9, -128, 127)
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(found.reshape(6, 20, *window.out), expected)


def test_a_pool_of_another_size_is_refused() -> None:
    window = Window(1, 4, (1, 2, 2), (1, 1, 1), (1, 2, 2), (1, 1, 1), (1, 1, 1), (0, 0, 0), 0, True)
    code = [Load(0, 0, Loops(16), post=Token.LOADED), Vector(0, 0, 0, 5, 16, wait=Token.LOADED), Halt()]
    program = program_of(code)
    spec = VectorSpec(VectorFunction.MAX_POOL, window=0)
    changed = {"vectors": (spec,), "windows": (window,), "constants": bytes(16), "dram_bytes": 16}
    with pytest.raises(ProgramError, match="a pool of 4 results, not 5") as raised:
        run(Program(**{**program.__dict__, **changed}), load_spec("edge_16x16"), {})
    assert raised.value.index == 1


def test_filling_reads_nothing() -> None:
    program = program_of([Vector(0, 0, 64, 32, 32), Halt()])
    spec = VectorSpec(VectorFunction.FILL, zero_point=-3)
    result = run(Program(**{**program.__dict__, "vectors": (spec,)}), load_spec("edge_16x16"), {})
    assert result.cycles == 2
    assert result.counts.scratchpad_read_bytes == 0
    assert result.counts.accumulator_write_bytes == 32
