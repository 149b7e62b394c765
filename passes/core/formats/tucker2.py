"""Tucker-2: both channel spaces made small (Kim et al., ICLR 2016; HALOC's format), ranks chosen apart.

    1x1 to r1 channels, kxk from r1 to r2, 1x1 to O

The outer factors are the leading ones of the output side (as channel_svd_out) and of the input side (as
channel_svd_in), the core is what they leave: HOSVD in the metric of the data. Refuses kernels of one tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from passes.core.factor import Factors, Rank, pointwise_like
from passes.core.fit import FitProblem, low_rank_factors
from passes.core.formats.channel_svd import input_factors
from passes.core.site import Geometry, Stage


@dataclass(frozen=True)
class Tucker2:
    name: str = "tucker2"

    def full_rank(self, stage: Stage) -> Rank | None:
        taps = prod(stage.geometry.kernel)
        if taps == 1:
            return None
        channels, out = stage.weight.shape[1], stage.out_channels // stage.geometry.groups
        return min(channels, out * taps), min(out, channels * taps)

    def geometries(self, geometry: Geometry) -> tuple[Geometry, ...]:
        point = pointwise_like(geometry)
        return point, geometry, point

    def widths(self, rank: Rank) -> tuple[int, ...]:
        return rank

    def decompose(self, geometry: Geometry, problem: FitProblem) -> Factors:
        groups, out, _, *kernel = problem.target.shape
        ones = (1,) * len(kernel)
        inner, rest, spectrum_in = input_factors(problem)  # B = rest x inner
        left, right, spectrum_out = low_rank_factors(problem, problem.matrix, problem.gram)  # B = left x right
        # right = project x B, so the core is the same projection of what the input factor leaves
        project = _projection(problem, left, right)
        core = np.matmul(project, rest.reshape(groups, out, -1))
        core = core.reshape(groups, right.shape[1], inner.shape[1], *kernel)
        weights = (inner.reshape(*inner.shape, *ones), core, left.reshape(*left.shape, *ones))
        return Factors(self.geometries(geometry), weights, (spectrum_in, spectrum_out))


def _projection(problem: FitProblem, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """P (g, R, O) with right = P B: the inverse of the output factor on the space that it spans."""
    weighted = problem.weighted(left)
    inverse = np.linalg.pinv(weighted)
    return np.matmul(inverse, problem.root) if problem.root is not None else inverse
