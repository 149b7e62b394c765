"""Channel SVD: a kxk convolution between two channel spaces of which one is made small.

    channel_svd_out:  kxk to r channels, then 1x1   (Zhang et al., TPAMI 2016: PCA of the outputs)
    channel_svd_in:   1x1 to r channels, then kxk

Stride, dilation and padding stay with the kxk stage. Refuses kernels of one tap: see svd.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from passes.core.factor import Factors, Rank, pointwise_like
from passes.core.fit import FitProblem, low_rank_factors
from passes.core.formats.svd import Svd
from passes.core.site import Array, Geometry, Stage


@dataclass(frozen=True)
class ChannelSvdOut(Svd):
    name: str = "channel_svd_out"

    def full_rank(self, stage: Stage) -> Rank | None:
        if prod(stage.geometry.kernel) == 1:
            return None
        groups = stage.geometry.groups
        return (min(stage.out_channels // groups, stage.weight.size // stage.out_channels),)


@dataclass(frozen=True)
class ChannelSvdIn:
    name: str = "channel_svd_in"

    def full_rank(self, stage: Stage) -> Rank | None:
        taps = prod(stage.geometry.kernel)
        if taps == 1:
            return None
        return (min(stage.weight.shape[1], stage.out_channels // stage.geometry.groups * taps),)

    def geometries(self, geometry: Geometry) -> tuple[Geometry, ...]:
        return pointwise_like(geometry), geometry

    def widths(self, rank: Rank) -> tuple[int, ...]:
        return rank

    def decompose(self, geometry: Geometry, problem: FitProblem) -> Factors:
        inner, outer, spectrum = input_factors(problem)
        kernel = problem.target.shape[3:]
        inner = inner.reshape(*inner.shape, *(1,) * len(kernel))
        return Factors(self.geometries(geometry), (inner, outer), (spectrum,))


def channel_gram(problem: FitProblem) -> Array | None:
    """The covariance of input channels (g, I, I), averaged over the taps of the kernel."""
    if problem.gram is None:
        return None
    groups, _, channels, *kernel = problem.target.shape
    taps = prod(kernel)
    split = problem.gram.reshape(groups, channels, taps, channels, taps)
    return np.asarray(np.einsum("gitjt->gij", split) / taps)


def input_factors(problem: FitProblem) -> tuple[Array, Array, Array]:
    """The 1x1 factor (g, R, I), the rest (g, O, R, *kernel), and the squared singular values (g, R) of their split."""
    groups, out, channels, *kernel = problem.target.shape
    weighted = problem.weighted(problem.matrix).reshape(groups, out, channels, -1)
    columns = np.moveaxis(weighted, 3, 2).reshape(groups, -1, channels)  # (g, O x taps, I)
    plain = FitProblem(columns[:, :, :, None])
    left, inner, spectrum = low_rank_factors(plain, columns, channel_gram(problem))
    rank = inner.shape[1]
    outer = np.moveaxis(left.reshape(groups, out, -1, rank), 2, 3)  # (g, O, R, taps)
    outer = problem.unweighted(outer.reshape(groups, out, -1))
    return inner, outer.reshape(groups, out, rank, *kernel), spectrum
