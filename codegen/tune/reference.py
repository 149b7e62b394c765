"""What a kernel must compute, at some of its output positions, in float64 by plain sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codegen.tune.workload import Workload
from passes.core.patches import patches

_MOST_MACS = 10**8
_FEWEST_POSITIONS = 64


@dataclass(frozen=True, eq=False)
class Reference:
    """A workload's arrays and its output at ``positions`` of (batch, *output spatial), counted in row-major order.

    ``x``: (N, C, *spatial), ``weight``: (O, I / groups, *kernel), ``bias``: (O,), all of float32; a linear layer has no
    spatial axes. ``values``: (positions, O) in float64, clamped at 0 from below.
    """

    x: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    positions: NDArray[np.intp]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, workload: Workload, seed: int = 0) -> Reference:
        """Random arrays; all positions of a small output, of a large one the first, the last and some between."""
        work, geometry = workload.work, workload.work.geometry
        rng = np.random.default_rng(seed)
        groups = geometry.groups
        x = rng.standard_normal((work.batch, work.in_channels, *work.spatial), np.float32)
        weight = rng.standard_normal((work.out_channels, work.in_channels // groups, *geometry.kernel), np.float32)
        bias = rng.standard_normal(work.out_channels, np.float32)
        count = work.batch * int(np.prod(work.output_spatial))
        positions = _some(rng, count, max(_FEWEST_POSITIONS, _MOST_MACS // work.weights))
        columns = patches(x.astype(np.float64), geometry, positions)  # (groups, positions, taps of a group)
        matrices = weight.astype(np.float64).reshape(groups, work.out_channels // groups, -1)
        sums = np.concatenate([columns[g] @ matrices[g].T for g in range(groups)], axis=1)
        return cls(x, weight, bias, positions, np.maximum(sums + bias, 0.0))

    def error(self, output: NDArray[np.float32]) -> float:
        """The largest difference of ``output``, (N, O, *output spatial), relative to the largest; nan for a nan."""
        found = np.moveaxis(output, 1, -1).reshape(-1, output.shape[1])
        if not np.isfinite(found).all():
            return float("nan")
        return float(np.abs(found[self.positions] - self.values).max() / np.abs(self.values).max())


def _some(rng: np.random.Generator, count: int, most: int) -> NDArray[np.intp]:
    if count <= most:
        return np.arange(count)
    ends = min(most // 4, count // 2)  # tiles that hang over the border are at the ends
    between = ends + rng.choice(count - 2 * ends, most - 2 * ends, replace=False)
    return np.sort(np.concatenate([np.arange(ends), between, np.arange(count - ends, count)]))
