"""The way out of the accumulators: requantization, activation, residual. All in float32, one rounding each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.isa import Output, Sum


def to_integers(values: NDArray[np.uint8], signed: bool) -> NDArray[np.float32]:
    """Bytes as the integers that they stand for, in float32."""
    return (values.view(np.int8) if signed else values).astype(np.float32)


def to_bytes(real: NDArray[np.float32], zero_point: int, low: int, high: int) -> NDArray[np.uint8]:
    """``clamp(rint(real) + zero_point, low, high)`` as bytes; ``real`` is used up."""
    np.rint(real, out=real)
    np.clip(real, np.float32(low - zero_point), np.float32(high - zero_point), out=real)
    return (real.astype(np.int16) + np.int16(zero_point)).astype(np.uint8)


def add(a: NDArray[np.uint8], b: NDArray[np.uint8], how: Sum) -> NDArray[np.uint8]:
    """The quantized sum of two bytes: two fused multiply-adds, each rounded to float32 once."""
    own = (to_integers(a, how.own_signed), np.float32(how.own_ratio))
    other = (to_integers(b, how.other_signed), np.float32(how.other_ratio))
    last, first = (own, other) if how.own_first else (other, own)
    return to_bytes(_fma(*last, _fma(*first, np.float32(how.offset))), 0, how.low, how.high)


def _fma(a: NDArray[np.float32], b: np.float32, c: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """a * b + c; the product of a byte and a float32 is exact in float64."""
    return np.asarray(a.astype(np.float64) * np.float64(b) + np.asarray(c, np.float64), np.float32)


def requantize(words: NDArray[np.int32], scales: NDArray[np.float32], output: Output) -> NDArray[np.uint8]:
    """Accumulator words to bytes; ``scales`` are broadcast to their shape."""
    return to_bytes(words.astype(np.float32) * scales, output.zero_point, output.low, output.high)


def look_up(values: NDArray[np.uint8], table: bytes) -> NDArray[np.uint8]:
    """A table of 256 bytes, by element."""
    return np.take(np.frombuffer(table, np.uint8), values)
