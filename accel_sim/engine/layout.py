"""Maps as the network has them, and as they lie in DRAM: see "Layouts" in :mod:`accel_sim.program.isa`.

The network has (N, C, axes...); a matrix is N rows of C channels; a vector is one row; a scalar has one channel.
DRAM has images x blocks x positions x lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(images, channels, positions) of a tensor of the network's ``shape``."""
    if len(shape) < 2:
        return 1, prod(shape), 1
    return shape[0], shape[1], prod(shape[2:])


def blocks(channels: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first channel, width) of each block of a map."""
    for first in range(0, channels, columns):
        yield first, min(columns, channels - first)


def pack_map(values: NDArray[np.generic], shape: tuple[int, ...], columns: int) -> NDArray[np.uint8]:
    """Bytes in the layout of maps, shape (samples, prod(shape)), of int8 or uint8 ``values``, (samples, *shape).

    ValueError where the values have another shape or width.
    """
    if values.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)) or values.shape[1:] != shape:
        raise ValueError(f"{values.dtype} of shape {values.shape[1:]} where bytes of shape {shape} were expected")
    images, channels, positions = map_shape(shape)
    samples = len(values)
    bytes_ = np.ascontiguousarray(values).view(np.uint8).reshape(samples, images, channels, positions)
    packed = np.empty((samples, images, channels * positions), np.uint8)
    for first, width in blocks(channels, columns):
        block = packed[:, :, first * positions : (first + width) * positions]
        block.reshape(samples, images, positions, width)[...] = bytes_[:, :, first : first + width].swapaxes(2, 3)
    return packed.reshape(samples, -1)


def unpack_map(data: NDArray[np.uint8], shape: tuple[int, ...], columns: int, signed: bool) -> NDArray[np.generic]:
    """The inverse of :func:`pack_map`: ``data`` is (samples, prod(shape)); gives int8 or uint8 of (samples, *shape)."""
    images, channels, positions = map_shape(shape)
    samples = len(data)
    if data.shape != (samples, prod(shape)):
        raise ValueError(f"{data.shape[1:]} bytes where {prod(shape)} were expected, those of shape {shape}")
    packed = data.reshape(samples, images, channels * positions)
    values = np.empty((samples, images, channels, positions), np.uint8)
    for first, width in blocks(channels, columns):
        block = packed[:, :, first * positions : (first + width) * positions]
        values[:, :, first : first + width] = block.reshape(samples, images, positions, width).swapaxes(2, 3)
    return values.view(np.int8 if signed else np.uint8).reshape(samples, *shape)


def byte_offsets(shape: tuple[int, ...], columns: int) -> NDArray[np.int64]:
    """Where each element of a tensor lies from the map's address on, in the network's ``shape``."""
    images, channels, positions = map_shape(shape)
    i, c, p = np.ogrid[:images, :channels, :positions]
    first = c // columns * columns
    width = np.minimum(columns, channels - first)
    return np.asarray(i * channels * positions + first * positions + p * width + c - first, np.int64).reshape(shape)
