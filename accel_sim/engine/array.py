"""What the array computes: a tile of a convolution as one exact integer product."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.layout import blocks
from accel_sim.program.isa import Window

_EXACT = 1 << 24
"""Integers up to here are exact in float32."""


@lru_cache(maxsize=512)
def tap_positions(window: Window) -> NDArray[np.int32]:
    """Position in the map's extent that output position o reads at tap t, (prod(out), taps); prod(extent) if padding.

    The same for every image.
    """
    inside = np.ones((1, 1), np.bool_)
    position = np.zeros((1, 1), np.int64)
    for axis in range(3):
        o = np.arange(window.out[axis])[:, None] * window.strides[axis] + window.origin[axis]
        at = o + np.arange(window.kernel[axis])[None, :] * window.dilations[axis]  # (out, kernel) of this axis
        valid = (at >= 0) & (at < window.extent[axis])
        shape = (inside.shape[0] * at.shape[0], inside.shape[1] * at.shape[1])
        inside = (inside[:, None, :, None] & valid[None, :, None, :]).reshape(shape)
        position = (position[:, None, :, None] * window.extent[axis] + at[None, :, None, :]).reshape(shape)
    found = np.where(inside, position, prod(window.extent)).astype(np.int32)
    found.setflags(write=False)
    return found


@lru_cache(maxsize=512)
def bytes_read(window: Window, first_channel: int, channels: int, columns: int) -> NDArray[np.bool_]:
    """Which bytes of a stored map the window reads of ``channels`` channels: (images * map's channels * positions,)."""
    positions = prod(window.extent)
    read = np.zeros(positions + 1, np.bool_)
    read[tap_positions(window)] = True
    used = np.zeros((window.images, window.channels * positions), np.bool_)
    for first, width in blocks(window.channels, columns):
        lanes = np.arange(first, first + width)
        wanted = (lanes >= first_channel) & (lanes < first_channel + channels)
        block = used[:, first * positions : (first + width) * positions].reshape(window.images, positions, width)
        block[...] = read[:positions, None] & wanted
    flat = used.reshape(-1)
    flat.setflags(write=False)
    return flat


def gather(
    stored: NDArray[np.uint8], window: Window, columns: int, first_channel: int, channels: int
) -> NDArray[np.uint8]:
    """im2col: bytes (samples, images, prod(out), taps, channels) of ``stored``, (samples, bytes of the map)."""
    at = tap_positions(window)
    samples, positions = len(stored), prod(window.extent)
    maps = stored.reshape(samples, window.images, -1)
    out = np.empty((samples, window.images, *at.shape, channels), np.uint8)
    last_channel = first_channel + channels
    padded = bool((at == positions).any())
    for first, width in blocks(window.channels, columns):
        low, high = max(first, first_channel), min(first + width, last_channel)
        if low >= high:
            continue
        block = maps[:, :, first * positions : (first + width) * positions]
        rows = block.reshape(samples, window.images, positions, width)[..., low - first : high - first]
        if padded:
            pad = np.full((samples, window.images, 1, high - low), window.pad_value & 0xFF, np.uint8)
            rows = np.concatenate((rows, pad), axis=2)
        out[..., low - first_channel : high - first_channel] = rows[:, :, at]
    return out


def product(left: NDArray[np.uint8], signed: bool, right: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Exact product of bytes, in int32 (wrapping as the accumulators do): (samples, M, K) x (1 or samples, K, N).

    ``left`` is int8 where ``signed``, else uint8; ``right`` is int8. In float32, in pieces of K short enough for every
    sum to be exact.
    """
    samples, m, k = left.shape
    n = right.shape[2]
    a = left.view(np.int8) if signed else left
    b = right.view(np.int8)
    piece = _EXACT // (128 * (128 if signed else 255))
    total = np.zeros((samples, m, n), np.int32)
    for begin in range(0, k, piece):
        part_a = a[:, :, begin : begin + piece].astype(np.float32)
        part_b = b[:, begin : begin + piece].astype(np.float32)
        if len(part_b) == 1:
            part = (part_a.reshape(samples * m, -1) @ part_b[0]).reshape(samples, m, n)
        else:
            part = part_a @ part_b
        total += part.astype(np.int32)
    return total


def to_blocks(tile: NDArray[np.int32], columns: int) -> NDArray[np.int32]:
    """Sums (samples, M, N) as they lie in the accumulators: blocks x positions x lanes, (samples, M * N)."""
    samples, m, n = tile.shape
    if n <= columns:
        return np.ascontiguousarray(tile).reshape(samples, m * n)
    parts = [tile[:, :, first : first + width].reshape(samples, -1) for first, width in blocks(n, columns)]
    return np.concatenate(parts, axis=1)


def bias_words(words: NDArray[np.int32], m: int, columns: int) -> NDArray[np.int32]:
    """Biases (samples, N), each for all ``m`` positions, as they lie in the accumulators: (samples, m * N)."""
    samples, n = words.shape
    return to_blocks(np.broadcast_to(words[:, None, :], (samples, m, n)), columns)
