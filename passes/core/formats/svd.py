"""SVD of a linear layer or a 1x1 convolution.

    y = W x             W: (O, I)
    y = A (C x)         C: (r, I), A: (O, r)

With the data's covariance it is the whitened SVD (equal to principal components of the outputs), whose error is the
discarded part of the spectrum. Refuses kernels with more than one tap: see channel_svd and spatial_svd.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from passes.core.factor import Factors, Rank, pointwise_like
from passes.core.fit import FitProblem, low_rank_factors
from passes.core.site import Geometry, Stage


@dataclass(frozen=True)
class Svd:
    name: str = "svd"

    def full_rank(self, stage: Stage) -> Rank | None:
        if prod(stage.geometry.kernel) != 1:
            return None
        return (min(stage.out_channels // stage.geometry.groups, stage.weight.shape[1]),)

    def geometries(self, geometry: Geometry) -> tuple[Geometry, ...]:
        return geometry, pointwise_like(geometry)

    def widths(self, rank: Rank) -> tuple[int, ...]:
        return rank

    def decompose(self, geometry: Geometry, problem: FitProblem) -> Factors:
        left, right, spectrum = low_rank_factors(problem, problem.matrix, problem.gram)
        kernel = problem.target.shape[3:]
        groups, rank, _ = right.shape
        inner = right.reshape(groups, rank, problem.target.shape[2], *kernel)
        outer = left.reshape(*left.shape, *(1,) * len(kernel))
        return Factors(self.geometries(geometry), (inner, outer), (spectrum,))
