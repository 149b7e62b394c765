"""Second-order statistics of a site: what its factors are fitted to.

With patches x and wanted outputs t, every closed-form fit of a linear map needs only their means and covariances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from passes.core.site import Array
from passes.core.workers import ALONE, BLOCK, Workers


class Samples:
    """The patches x of a site, and what is measured and predicted at them, in blocks by ``workers``.

    Products are made in the samples' own precision, block by block, and summed in float64. The mean is taken off
    before, because in float32 a mean of 100 deviations hides the covariance.
    """

    def __init__(self, x: Array, workers: Workers = ALONE, block: int = BLOCK) -> None:
        """``x``: (g, n, K) floating, n > 0. It is taken over: its mean is taken off in place."""
        if not x.shape[1]:
            raise ValueError("there are no samples to measure")
        self._workers, self._block = workers, block
        self._x, self.count = x, x.shape[1]
        self.mean = self._mean(x)
        self._shift = self.mean.astype(x.dtype)
        self._rest = self.mean - self._shift  # what rounding left of it

        def centre(part: slice) -> None:
            x[:, part] -= self._shift[:, None]

        self._in_blocks(centre)

    def gram(self) -> Array:
        """E[x x'] - E[x] E[x]', (g, K, K) float64."""
        found = self._sum(lambda part: np.matmul(self._x[:, part].swapaxes(1, 2), self._x[:, part])) / self.count
        found -= self._rest[:, :, None] * self._rest[:, None, :]
        return np.asarray((found + found.swapaxes(1, 2)) / 2)

    def cross(self, t: Array) -> tuple[Array, Array]:
        """For values t (g, n, O) that belong to the patches: E[t], (g, O), and E[t x'] - E[t] E[x]', (g, O, K)."""
        mean = self._mean(t)
        shift = mean.astype(t.dtype)

        def product(part: slice) -> Array:
            return np.asarray(np.matmul((t[:, part] - shift[:, None]).swapaxes(1, 2), self._x[:, part]))

        return mean, self._sum(product) / self.count - (mean - shift)[:, :, None] * self._rest[:, None, :]

    def predicted(self, weight: Array, bias: Array) -> Array:
        """What a layer with ``weight`` (g, O, K) and ``bias`` (g, O) makes of x: (g, n, O), in the precision of x."""
        dtype = self._x.dtype
        right = weight.swapaxes(1, 2).astype(dtype)
        level = (bias + np.einsum("gok,gk->go", weight, self._shift.astype(np.float64))).astype(dtype)[:, None]
        out = np.empty((*self._x.shape[:2], right.shape[2]), dtype)

        def fill(part: slice) -> None:
            np.matmul(self._x[:, part], right, out=out[:, part])
            out[:, part] += level

        self._in_blocks(fill)
        return out

    def _mean(self, values: Array) -> Array:
        return np.asarray(self._sum(lambda part: values[:, part].sum(axis=1, dtype=np.float64)) / self.count)

    def _sum(self, of: Callable[[slice], Array]) -> Array:
        parts = self._workers.blocks(of, self.count, self._block)
        total = next(parts).astype(np.float64)
        for part in parts:
            total += part
        return total

    def _in_blocks(self, work: Callable[[slice], None]) -> None:
        for _ in self._workers.blocks(work, self.count, self._block):
            pass


@dataclass(frozen=True, eq=False)
class Moments:
    """Centred moments per group, float64.

    ``mean_x``: (g, K); ``mean_t``: (g, O); ``gram``: (g, K, K), E[x x']; ``cross``: (g, O, K), E[t x']; ``count``
    samples behind them.
    """

    mean_x: Array
    mean_t: Array
    gram: Array
    cross: Array
    count: int

    @classmethod
    def of(cls, samples: Samples, t: Array) -> Moments:
        """From patches and the values ``t`` (g, n, O) that are wanted there."""
        mean, cross = samples.cross(t)
        return cls(samples.mean, mean, samples.gram(), cross, samples.count)

    def retarget(self, samples: Samples, t: Array) -> Moments:
        """The same patches with other values wanted; the Gram matrix is kept."""
        mean, cross = samples.cross(t)
        return replace(self, mean_t=mean, cross=cross)

    def ridge(self, strength: float) -> Array:
        """``gram`` with ``strength`` x its mean eigenvalue added to the diagonal: invertible also for few samples."""
        k = self.gram.shape[-1]
        level = np.trace(self.gram, axis1=1, axis2=2) / k
        level = np.where(level > 0, level, 1.0)
        return np.asarray(self.gram + (strength * level)[:, None, None] * np.eye(k))
