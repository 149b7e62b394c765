"""What the vector unit computes: element-wise functions and pools, on bytes."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.array import gather, tap_positions
from accel_sim.engine.layout import blocks
from accel_sim.engine.output import add, look_up, to_bytes, to_integers
from accel_sim.program.isa import Program, VectorFunction, VectorSpec, Window

POOLS = (VectorFunction.MAX_POOL, VectorFunction.AVERAGE_POOL)
BINARY = (VectorFunction.SUM, VectorFunction.PRODUCT)


def element_wise(
    program: Program, spec: VectorSpec, a: NDArray[np.uint8], b: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """Bytes out, of the shape of ``a``; ``b`` is given for functions of two operands."""
    if spec.function == VectorFunction.COPY:
        return a
    if spec.function == VectorFunction.TABLE:
        return look_up(a, program.tables[spec.table])
    assert b is not None
    if spec.function == VectorFunction.SUM:
        return add(a, b, program.sums[spec.sum])
    real = to_integers(a, spec.signed) - np.float32(spec.a_zero)
    real *= to_integers(b, spec.signed) - np.float32(spec.b_zero)
    real *= np.float32(spec.ratio)
    real += np.float32(spec.zero_point)
    return to_bytes(real, 0, spec.low, spec.high)


def pool(stored: NDArray[np.uint8], spec: VectorSpec, window: Window, columns: int) -> NDArray[np.uint8]:
    """A pool of a stored map, (samples, bytes of the map); gives the bytes of the resulting map, in its layout."""
    samples, images = len(stored), window.images
    outputs = prod(window.out)
    result = np.empty((samples, images, window.channels * outputs), np.uint8)
    if spec.function == VectorFunction.AVERAGE_POOL:
        at = tap_positions(window)
        inside = (at < prod(window.extent)).sum(axis=1)
        count = np.full(outputs, at.shape[1]) if spec.count_padding else np.maximum(inside, 1)
        multiplier = (np.float32(spec.ratio) / (np.float32(spec.divisor) * count.astype(np.float32)))[:, None]
    for first, width in blocks(window.channels, columns):
        taps = gather(stored, window, columns, first, width)
        integers = taps.view(np.int8) if window.signed else taps
        if spec.function == VectorFunction.MAX_POOL:
            block = integers.max(axis=3).view(np.uint8)
        else:
            total = integers.sum(axis=3, dtype=np.int32) - taps.shape[3] * spec.a_zero
            real = total.astype(np.float32) * multiplier
            block = to_bytes(real, spec.zero_point, spec.low, spec.high)
        part = result[:, :, first * outputs : (first + width) * outputs]
        part.reshape(samples, images, outputs, width)[...] = block
    return result.reshape(samples, -1)
