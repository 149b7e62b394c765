"""Spatial SVD: a convolution split along its axes (Jaderberg et al., BMVC 2014).

    spatial_svd_vh:  kx1, then 1xk
    spatial_svd_hv:  1xk, then kx1

In three dimensions the first axis is split from the others. Each stage takes the stride, dilation and padding of its
own axes, so depthwise convolutions (one channel per group) factorize as well. Refuses kernels with fewer than two
axes of more than one tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from passes.core.factor import Factors, Rank, axis_geometry
from passes.core.fit import FitProblem, low_rank_factors
from passes.core.site import Geometry, Stage


@dataclass(frozen=True)
class SpatialSvd:
    name: str

    def _first_axes(self, ndim: int) -> frozenset[int]:
        return frozenset({0}) if self.name == "spatial_svd_vh" else frozenset(range(1, ndim))

    def full_rank(self, stage: Stage) -> Rank | None:
        kernel = stage.geometry.kernel
        if len(kernel) < 2 or kernel[0] == 1 or prod(kernel[1:]) == 1:
            return None
        first = prod(kernel[a] for a in self._first_axes(len(kernel)))
        out = stage.out_channels // stage.geometry.groups
        return (min(stage.weight.shape[1] * first, out * (prod(kernel) // first)),)

    def geometries(self, geometry: Geometry) -> tuple[Geometry, ...]:
        first = self._first_axes(geometry.ndim)
        return axis_geometry(geometry, first), axis_geometry(geometry, frozenset(range(geometry.ndim)) - first)

    def widths(self, rank: Rank) -> tuple[int, ...]:
        return rank

    def decompose(self, geometry: Geometry, problem: FitProblem) -> Factors:
        groups, out, channels, *kernel = problem.target.shape
        n = len(kernel)
        axes = sorted(self._first_axes(n))
        rest = [a for a in range(n) if a not in axes]
        weighted = problem.weighted(problem.matrix).reshape(problem.target.shape)
        # (g, O, *rest | I, *first): what the second stage sums over, what the first one does
        order = (0, 1, *(3 + a for a in rest), 2, *(3 + a for a in axes))
        rows = out * prod(kernel[a] for a in rest)
        columns = weighted.transpose(order).reshape(groups, rows, -1)
        gram = None
        if problem.gram is not None:
            split = problem.gram.reshape(groups, channels, *kernel, channels, *kernel)
            left_axes, right_axes = list(range(2, 2 + n)), list(range(3 + n, 3 + 2 * n))
            for a in rest:
                right_axes[a] = left_axes[a]  # the same tap of the other stage on both sides, averaged
            subscripts = [0, 1, *left_axes, 2 + n, *right_axes]
            kept = [0, 1, *(left_axes[a] for a in axes), 2 + n, *(right_axes[a] for a in axes)]
            gram = np.einsum(split, subscripts, kept) / prod(kernel[a] for a in rest)
            gram = gram.reshape(groups, columns.shape[2], columns.shape[2])
        left, right, spectrum = low_rank_factors(FitProblem(columns[:, :, :, None]), columns, gram)
        rank = right.shape[1]
        shape_first = [kernel[a] if a in axes else 1 for a in range(n)]
        shape_rest = [kernel[a] if a in rest else 1 for a in range(n)]
        inner = right.reshape(groups, rank, channels, *shape_first)
        outer = np.moveaxis(left.reshape(groups, out, -1, rank), 2, 3).reshape(groups, out, -1)
        outer = problem.unweighted(outer).reshape(groups, out, rank, *shape_rest)
        return Factors(self.geometries(geometry), (inner, outer), (spectrum,))
