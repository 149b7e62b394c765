"""Second-order statistics of a site: what its factors are fitted to.

With patches x and wanted outputs t, every closed-form fit of a linear map needs only their means and covariances.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        gram, cross = _covariances(x, mean_x, (x, t), (mean_x, mean_t), workers)
        energy = np.square(t, dtype=np.float64).mean(axis=1) - mean_t**2
        return cls(mean_x, mean_t, (gram + gram.swapaxes(1, 2)) / 2, cross, np.maximum(energy, 0), n)

    def retarget(self, x: Array, t: Array, workers: Workers = ALONE) -> Moments:
        """The same patches with other targets; the Gram matrix is kept."""
        n = x.shape[1]
        mean_t = t.mean(axis=1, dtype=np.float64)
        (cross,) = _covariances(x, self.mean_x, (t,), (mean_t,), workers)
        energy = np.square(t, dtype=np.float64).mean(axis=1) - mean_t**2
        return Moments(self.mean_x, mean_t, self.gram, cross, np.maximum(energy, 0), n)

    def ridge(self, strength: float) -> Array:
        """``gram`` with ``strength`` x its mean eigenvalue added to the diagonal: invertible also for few samples."""
        k = self.gram.shape[-1]
        level = np.trace(self.gram, axis1=1, axis2=2) / k
        level = np.where(level > 0, level, 1.0)
        return np.asarray(self.gram + (strength * level)[:, None, None] * np.eye(k))


def _covariances(
    x: Array,
    mean_x: Array,
    others: Sequence[Array],
    means: Sequence[Array],
    workers: Workers = ALONE,
    block: int = BLOCK,
) -> list[Array]:
    """E[a x'] - E[a] E[x]' per group, (g, A, K), for each a of ``others``, of which x may be one.

    Products of blocks in the samples' own precision, summed in float64. The means are taken off before the products,
    because in float32 a mean of 100 deviations hides the covariance.
    """
    shift = mean_x.astype(x.dtype)[:, None]
    shifts = [mean.astype(a.dtype)[:, None] for a, mean in zip(others, means, strict=True)]

    def products(part: slice) -> list[Array]:
        right = x[:, part] - shift
        lefts = (right if a is x else a[:, part] - s for a, s in zip(others, shifts, strict=True))
        return [np.matmul(left.swapaxes(1, 2), right) for left in lefts]

    sums = [np.zeros((a.shape[0], a.shape[2], x.shape[2])) for a in others]
    for found in workers.blocks(products, x.shape[1], block):
        for total, product in zip(sums, found, strict=True):
            total += product
    rest = mean_x - shift[:, 0]  # what rounding left of the means
    rests = (mean - s[:, 0] for mean, s in zip(means, shifts, strict=True))
    return [total / x.shape[1] - r[:, :, None] * rest[:, None, :] for total, r in zip(sums, rests, strict=True)]
