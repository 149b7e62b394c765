"""im2col in n dimensions, for any convolution: the patches that a stage multiplies with its weight.

A linear layer is the case of no taps, a transposed convolution is a plain one over the zero-stuffed input with the
taps in reverse order. Rows can be sampled, because statistics do not need every position of every image.
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np

from passes.core.site import Array, Geometry
from passes.core.workers import ALONE, Workers

_CACHED = 512
"""Rows put in order at a time: few enough to stay in a cache."""


def positions(geometry: Geometry, channels_first: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of outputs for an input of shape (N, C, *spatial): (N, *output spatial)."""
    return (channels_first[0], *geometry.output_spatial(channels_first[2:]))


def sample_rows(
    geometry: Geometry, shape: tuple[int, ...], limit: int, rng: np.random.Generator, weights: Array | None = None
) -> Array:
    """About ``limit`` output positions of an input of ``shape`` (N, C, *spatial), as sorted flat indices.

    With ``weights`` (*output spatial), 1 on average, each position is drawn as often as it weighs, on average, so that
    sums over the rows are weighted sums over the grid; then rows may repeat. Without, the draw is without replacement
    where the grid is small enough to list, and with it (then made unique) elsewhere, and all rows if they are few.
    """
    grid = positions(geometry, shape)
    total = prod(grid)
    if weights is not None and weights.shape == grid[1:]:
        return _weighted_rows(grid[0], weights.reshape(-1), min(limit, total), rng)
    if total <= limit:
        return np.arange(total)
    if total <= 8 * limit:
        return np.sort(rng.choice(total, limit, replace=False))
    return np.unique(rng.integers(0, total, limit))


def _weighted_rows(images: int, weights: Array, limit: int, rng: np.random.Generator) -> Array:
    share = weights / weights.sum()
    total = images * weights.size
    if total > 8 * limit:
        return np.sort(rng.integers(0, images, limit) * weights.size + rng.choice(weights.size, limit, p=share))
    # systematic resampling: each row as often as limit x share says, rounded up or down; shuffled, lest it beats with
    # the grid's own period
    order = rng.permutation(total)
    steps = np.floor(np.cumsum(np.tile(share / images, images)[order]) * limit + rng.random())
    return np.sort(np.repeat(order, np.diff(steps, prepend=0).astype(int)))


def _plain(x: Array, geometry: Geometry) -> tuple[Array, tuple[int, ...], list[int]]:
    """The input channels-last, and the strides and leading pads of the plain convolution over it."""
    x = np.moveaxis(x, 1, -1)
    n, strides = geometry.ndim, geometry.strides
    begins = list(geometry.pads[:n])
    if not geometry.transposed:
        return x, strides, begins
    spread = [(size - 1) * s + 1 for size, s in zip(x.shape[1:-1], strides, strict=True)]
    stuffed = np.zeros((x.shape[0], *spread, x.shape[-1]), x.dtype)
    stuffed[(slice(None), *(slice(None, None, s) for s in strides))] = x
    reach = [d * (k - 1) for d, k in zip(geometry.dilations, geometry.kernel, strict=True)]
    return stuffed, (1,) * n, [r - begin for r, begin in zip(reach, begins, strict=True)]


def patches(x: Array, geometry: Geometry, rows: Array, workers: Workers = ALONE, behind: Array | None = None) -> Array:
    """The patches at flat output positions ``rows``, and those of ``behind`` (groups, more rows, K) after them.

    ``x``: (N, C, *spatial), or (N, C) for a linear layer. Returns (groups, rows, K) with K = C/groups x taps in the
    order of ``weight.reshape(O, -1)``, so that ``patches @ weight.T`` is the stage's output without its bias.
    """
    groups = geometry.groups
    if geometry.ndim == 0:
        found = x[rows].reshape(len(rows), groups, -1).swapaxes(0, 1)
        return np.ascontiguousarray(found if behind is None else np.concatenate([found, behind], axis=1))
    grid = positions(geometry, x.shape)
    channels = x.shape[1]
    values, strides, begins = _plain(x, geometry)
    sides = values.shape[1:-1]
    image, *at = np.unravel_index(rows, grid)
    corners = [a * s - begin for a, s, begin in zip(at, strides, begins, strict=True)]  # of a row's first tap
    taps = list(product(*(range(k) for k in geometry.kernel)))
    steps = np.array(taps[::-1] if geometry.transposed else taps) * geometry.dilations  # (taps, ndim)
    apart = np.array([prod(sides[axis + 1 :]) for axis in range(geometry.ndim)])  # neighbours, in positions
    first = image * prod(sides) + sum(corner * step for corner, step in zip(corners, apart, strict=True))
    reach = steps @ apart
    flat = values.reshape(-1, channels)
    more = 0 if behind is None else behind.shape[1]
    out = np.empty((len(rows) + more, channels, len(taps)), x.dtype)
    by_group = out.reshape(len(out), groups, -1).swapaxes(0, 1)

    def fill(part: slice) -> None:
        found = flat.take(first[part, None] + reach, axis=0, mode="clip")
        outside = np.zeros((len(found), len(taps)), bool)
        for corner, step, side in zip(corners, steps.T, sides, strict=True):
            place = corner[part, None] + step
            outside |= (place < 0) | (place >= side)
        found[outside] = 0  # padding
        out[part] = found.swapaxes(1, 2)

    for _ in workers.blocks(fill, len(rows), _CACHED):
        pass
    if behind is not None:
        added = by_group[:, len(rows) :]

        def add(part: slice) -> None:
            added[:, part] = behind[:, part]

        for _ in workers.blocks(add, more):
            pass
    return np.ascontiguousarray(by_group)


def outputs_at(y: Array, groups: int, rows: Array) -> Array:
    """Values of an output (N, O, *spatial) at flat positions ``rows``: (groups, rows, O/groups)."""
    flat = np.moveaxis(y, 1, -1).reshape(-1, y.shape[1]) if y.ndim > 2 else y
    return np.ascontiguousarray(flat.take(rows, axis=0).reshape(len(rows), groups, -1).swapaxes(0, 1))
