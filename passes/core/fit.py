"""Closed-form fits of a chain to a wanted linear map, in the metric of the data.

The problem throughout: a target weight B (what the layer should do, on inputs it really sees), the covariance G of
its input patches and a weight H on its outputs; wanted is the chain whose composed weight W minimises

    tr( H (W - B) G (W - B)' )                                            (the expected weighted output error)

With G = H = 1 this is plain low-rank approximation; with G it is the whitened one, whose error is the discarded part
of a spectrum. Reduced-rank regression: Izenman 1975, J. Multivariate Analysis 5(2).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from passes.core.moments import Moments
from passes.core.site import Array, Stage, compose

T = TypeVar("T")

WIDE = 1200
"""Patches wider than this make every product with their covariance dear: fits are repeated less often."""


@dataclass(frozen=True, eq=False)
class FitProblem:
    """``target``: (g, O, I, *kernel) float64; ``gram``: (g, K, K) positive definite, or None for the identity;
    ``root``: (g, O, O) symmetric square root of the output metric H, or None for the identity."""

    target: Array
    gram: Array | None = None
    root: Array | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What ``find`` makes of the problem, made when it is first asked for under this ``key``."""
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found

    @property
    def matrix(self) -> Array:
        """The target as (g, O, K)."""
        return self.target.reshape(*self.target.shape[:2], -1)

    def weighted(self, matrix: Array) -> Array:
        """H^(1/2) times a matrix (g, O, ...)."""
        return matrix if self.root is None else np.matmul(self.root, matrix)

    def unweighted(self, matrix: Array) -> Array:
        """H^(-1/2) times a matrix (g, O, ...)."""
        return matrix if self.root is None else np.linalg.solve(self.root, matrix)

    def error(self, weight: Array) -> float:
        """tr(H (W - B) G (W - B)') for a composed weight of the target's shape, summed over groups."""
        delta = self.weighted((weight - self.target).reshape(self.matrix.shape))
        right = delta if self.gram is None else np.matmul(delta, self.gram)
        return float(max(np.sum(delta * right), 0.0))

    def energy(self) -> float:
        """The error of putting zero in place of the layer: what relative errors are relative to."""
        return self.error(np.zeros_like(self.target))


def solve_spd(matrix: Array, right: Array) -> Array:
    """``right @ inv(matrix)`` per group for symmetric positive definite matrices (g, K, K) and right (g, O, K)."""
    out = np.empty_like(right)
    for index in range(matrix.shape[0]):
        out[index] = cho_solve(_factor(matrix[index]), right[index].T).T
    return out


def _factor(matrix: Array) -> tuple[Array, bool]:
    """The Cholesky factor; a matrix that rounding has made indefinite gets as much of a ridge as it needs.

    Raises FloatingPointError for a matrix that is not finite: the data overflowed before it got here.
    """
    if not np.isfinite(matrix).all():
        raise FloatingPointError("the statistics of a layer are not finite: its activations overflow")
    level = max(float(np.trace(matrix)) / len(matrix), 1e-30)
    jitter = 0.0
    while True:
        try:
            shifted = matrix if not jitter else matrix + jitter * level * np.eye(len(matrix))
            factor: tuple[Array, bool] = cho_factor(shifted, lower=True, check_finite=False)
            return factor
        except LinAlgError:
            if jitter > 1:
                raise
            jitter = max(10 * jitter, 1e-8)


class Regression:
    """Ridge regression of targets on patches, shrunk towards a weight (g, O, K) instead of zero.

    The patches' covariance is factorized once and serves any number of targets. ``gram`` is that covariance with the
    ridge, (g, K, K).
    """

    def __init__(self, weight: Array, moments: Moments, ridge: float) -> None:
        self.gram = moments.ridge(ridge)
        self._weight = weight
        self._explained = np.matmul(weight, moments.gram)
        self._factors = [_factor(matrix) for matrix in self.gram]

    def fit(self, moments: Moments) -> Array:
        """The weight (g, O, K) for the targets of ``moments``, whose patches are those of the first ones."""
        missing = moments.cross - self._explained
        steps = [cho_solve(factor, m.T).T for factor, m in zip(self._factors, missing, strict=True)]
        return np.asarray(self._weight + np.stack(steps))


def low_rank_factors(problem: FitProblem, columns: Array, gram: Array | None) -> tuple[Array, Array, Array]:
    """All factors A (g, O, R) and C (g, R, K) of B = ``columns`` with ``A[..., :r] @ C[:, :r]`` best for every rank r.

    ``columns``: (g, O, K) may be any unfolding; R = min(O, K). Also returns the squared singular values (g, R),
    falling: the weighted error at rank r is the sum of those from r on. Computed from the smaller of the two Gram
    sides; at full rank the product is B itself up to rounding, whatever the metric.
    """
    b = problem.weighted(columns) if columns.shape[1] == problem.target.shape[1] else columns
    weighted = b is not columns
    rows, cols = b.shape[1:]
    if rows <= cols:
        outer = np.matmul(b if gram is None else np.matmul(b, gram), b.swapaxes(1, 2))
        spectrum, u = np.linalg.eigh((outer + outer.swapaxes(1, 2)) / 2)
        u = np.ascontiguousarray(u[:, :, ::-1])
        left = problem.unweighted(u) if weighted else u
        return left, np.matmul(u.swapaxes(1, 2), b), np.maximum(spectrum[:, ::-1], 0)
    if gram is None:
        inner = np.matmul(b.swapaxes(1, 2), b)
        spectrum, v = np.linalg.eigh((inner + inner.swapaxes(1, 2)) / 2)
        v = np.ascontiguousarray(v[:, :, ::-1])
        left, right = np.matmul(b, v), np.ascontiguousarray(v.swapaxes(1, 2))
    else:
        lower = np.stack([np.tril(_factor(matrix)[0]) for matrix in gram])
        m = np.matmul(b, lower)
        inner = np.matmul(m.swapaxes(1, 2), m)
        spectrum, v = np.linalg.eigh((inner + inner.swapaxes(1, 2)) / 2)
        v = np.ascontiguousarray(v[:, :, ::-1])
        left = np.matmul(m, v)
        right = np.linalg.solve(lower.swapaxes(1, 2), v).swapaxes(1, 2)  # C = V' L^-1
    return (problem.unweighted(left) if weighted else left), right, np.maximum(spectrum[:, ::-1], 0)


def _features(stages: Sequence[Stage]) -> Array:
    """What the last stage reads, as a linear map of the patch: (g, r x taps of the last, K)."""
    last = stages[-1]
    width = last.weight.shape[1]
    count = width * int(np.prod(last.geometry.kernel))
    eye = np.eye(count).reshape(count, width, *last.geometry.kernel)
    groups = last.geometry.groups
    probe = Stage(np.tile(eye, (groups, *(1,) * (eye.ndim - 1))), None, last.geometry)
    composed = compose((*stages[:-1], probe))
    return composed.reshape(groups, count, -1)


def refit_last(stages: Sequence[Stage], problem: FitProblem) -> tuple[Stage, ...]:
    """The last stage by least squares, those before it fixed. The output metric drops out of the solution."""
    features = _features(stages)
    projected = features if problem.gram is None else np.matmul(features, problem.gram)
    normal = np.matmul(projected, features.swapaxes(1, 2))
    right = np.matmul(problem.matrix, projected.swapaxes(1, 2))
    weight = solve_spd(_regular(normal), right)
    last = stages[-1]
    return (*stages[:-1], replace(last, weight=weight.reshape(last.weight.shape)))


def refit_last_two(stages: Sequence[Stage], problem: FitProblem) -> tuple[Stage, ...]:
    """The last two stages jointly by reduced-rank regression; the last one must be pointwise.

    For a chain of two this is the optimum of the whole chain, for Tucker-2 that of core and output factor.
    """
    *before, middle, last = stages
    normal: Array | None
    if any(k != 1 for k in last.geometry.kernel):
        return refit_last(stages, problem)
    rank = last.weight.shape[1]
    if before:
        features = _features((*before, middle))
        projected = features if problem.gram is None else np.matmul(features, problem.gram)
        normal = _regular(np.matmul(projected, features.swapaxes(1, 2)))
        columns = solve_spd(normal, np.matmul(problem.matrix, projected.swapaxes(1, 2)))
    else:
        normal, columns = problem.gram, problem.matrix
    if min(columns.shape[1:]) < rank:  # a rank that the stages before cannot fill
        return refit_last(stages, problem)
    left, right, _ = low_rank_factors(problem, columns, normal)
    shape = (middle.weight.shape[0], *middle.weight.shape[1:])
    return (
        *before,
        replace(middle, weight=right[:, :rank].reshape(shape)),
        replace(last, weight=left[:, :, :rank].reshape(last.weight.shape)),
    )


def _regular(normal: Array) -> Array:
    """A normal matrix made safely invertible: 1e-9 of its mean diagonal is added."""
    k = normal.shape[-1]
    level = np.trace(normal, axis1=1, axis2=2) / k
    level = np.where(level > 0, level, 1.0)
    return np.asarray(normal + (1e-9 * level)[:, None, None] * np.eye(k))
