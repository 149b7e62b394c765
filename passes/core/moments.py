"""Second-order statistics of a site: what its factors are fitted to.

With patches x and wanted outputs t, every closed-form fit of a linear map needs only their means and covariances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.core.site import Array
from passes.core.workers import ALONE, BLOCK, Workers


@dataclass(frozen=True, eq=False)
class Moments:
    """Centred moments per group, float64.

    ``mean_x``: (g, K); ``mean_t``: (g, O); ``gram``: (g, K, K), E[x x']; ``cross``: (g, O, K), E[t x'];
    ``energy``: (g, O), E[t^2]; ``count`` samples behind them.
    """

    mean_x: Array
    mean_t: Array
    gram: Array
    cross: Array
    energy: Array
    count: int

    @classmethod
    def of(cls, x: Array, t: Array, workers: Workers = ALONE) -> Moments:
        """From patches ``x`` (g, n, K) and targets ``t`` (g, n, O)."""
        n = x.shape[1]
        mean_x = x.mean(axis=1, dtype=np.float64)
        mean_t = t.mean(axis=1, dtype=np.float64)
        gram = _covariance(x, mean_x, x, mean_x, workers)
        cross = _covariance(t, mean_t, x, mean_x, workers)
        energy = np.square(t, dtype=np.float64).mean(axis=1) - mean_t**2
        return cls(mean_x, mean_t, (gram + gram.swapaxes(1, 2)) / 2, cross, np.maximum(energy, 0), n)

    def retarget(self, x: Array, t: Array, workers: Workers = ALONE) -> Moments:
        """The same patches with other targets; the Gram matrix is kept."""
        n = x.shape[1]
        mean_t = t.mean(axis=1, dtype=np.float64)
        cross = _covariance(t, mean_t, x, self.mean_x, workers)
        energy = np.square(t, dtype=np.float64).mean(axis=1) - mean_t**2
        return Moments(self.mean_x, mean_t, self.gram, cross, np.maximum(energy, 0), n)

    def ridge(self, strength: float) -> Array:
        """``gram`` with ``strength`` x its mean eigenvalue added to the diagonal: invertible also for few samples."""
        k = self.gram.shape[-1]
        level = np.trace(self.gram, axis1=1, axis2=2) / k
        level = np.where(level > 0, level, 1.0)
        return np.asarray(self.gram + (strength * level)[:, None, None] * np.eye(k))


def _covariance(
    a: Array, mean_a: Array, b: Array, mean_b: Array, workers: Workers = ALONE, block: int = BLOCK
) -> Array:
    """E[a b'] - E[a] E[b]' per group, (g, A, B): products of blocks in the samples' own precision, summed in float64.

    The means are taken off before the products, because in float32 a mean of 100 deviations hides the covariance.
    """
    shift_a, shift_b = mean_a.astype(a.dtype)[:, None], mean_b.astype(b.dtype)[:, None]

    def product(part: slice) -> Array:
        left = a[:, part] - shift_a
        right = left if a is b else b[:, part] - shift_b
        found: Array = np.matmul(left.swapaxes(1, 2), right)
        return found

    out = np.zeros((a.shape[0], a.shape[2], b.shape[2]))
    for found in workers.blocks(product, a.shape[1], block):
        out += found
    rest_a, rest_b = mean_a - shift_a[:, 0], mean_b - shift_b[:, 0]  # what rounding left of the means
    return np.asarray(out / a.shape[1] - rest_a[:, :, None] * rest_b[:, None, :])
