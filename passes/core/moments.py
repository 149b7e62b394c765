"""Second-order statistics of a site: what its factors are fitted to.

With patches x and wanted outputs t, every closed-form fit of a linear map needs only their means and covariances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.core.site import Array


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
    def of(cls, x: Array, t: Array) -> Moments:
        """From patches ``x`` (g, n, K) and targets ``t`` (g, n, O)."""
        n = x.shape[1]
        mean_x = x.mean(axis=1, dtype=np.float64)
        mean_t = t.mean(axis=1, dtype=np.float64)
        gram = _product(x, x) / n - mean_x[:, :, None] * mean_x[:, None, :]
        cross = _product(t, x) / n - mean_t[:, :, None] * mean_x[:, None, :]
        energy = np.square(t, dtype=np.float64).mean(axis=1) - mean_t**2
        return cls(mean_x, mean_t, (gram + gram.swapaxes(1, 2)) / 2, cross, np.maximum(energy, 0), n)

    def retarget(self, x: Array, t: Array) -> Moments:
        """The same patches with other targets; the Gram matrix is kept."""
        n = x.shape[1]
        mean_t = t.mean(axis=1, dtype=np.float64)
        cross = _product(t, x) / n - mean_t[:, :, None] * self.mean_x[:, None, :]
        energy = np.square(t, dtype=np.float64).mean(axis=1) - mean_t**2
        return Moments(self.mean_x, mean_t, self.gram, cross, np.maximum(energy, 0), n)

    def ridge(self, strength: float) -> Array:
        """``gram`` with ``strength`` x its mean eigenvalue added to the diagonal: invertible also for few samples."""
        k = self.gram.shape[-1]
        level = np.trace(self.gram, axis1=1, axis2=2) / k
        level = np.where(level > 0, level, 1.0)
        return np.asarray(self.gram + (strength * level)[:, None, None] * np.eye(k))


def _product(a: Array, b: Array, block: int = 65536) -> Array:
    """a' b over samples, per group: float32 products of blocks, summed in float64."""
    out = np.zeros((a.shape[0], a.shape[2], b.shape[2]))
    for start in range(0, a.shape[1], block):
        part = slice(start, start + block)
        out += np.matmul(a[:, part].swapaxes(1, 2), b[:, part])
    return out
