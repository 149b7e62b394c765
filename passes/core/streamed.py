"""The SVD of a layer that is too large to be copied: its weight stays in its file, and so do its factors.

For W (O, K) the smaller Gram side, W W' or W' W, is built block by block; its eigenvectors of a wanted rank, and no
others, are then put on W (a method of snapshots: Sirovich 1987). What is held at a time is the Gram matrix, at most as
large as W, or as half of W where that leaves room for double precision, and those eigenvectors. Rank r therefore costs
an eigensolution, where :class:`passes.core.factor.Factors` has them all from one. Only formats whose first stage sees
the whole patch are an SVD of the weight as it stands, see :func:`streams`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import get_blas_funcs

from passes.core.factor import FactorFormat, Rank
from passes.core.formats.svd import Svd
from passes.core.mapped import release, unwritten
from passes.core.site import Array, Geometry, Stage

LARGE_BYTES = 32 << 20
"""From here on a layer without calibration data is decomposed in its file, where it lies in one."""

_BLOCKS = 8


def streams(format: FactorFormat) -> bool:
    """True for formats that :class:`StreamedSvd` can stand in for: their first stage sees the whole patch."""
    return isinstance(format, Svd)


@dataclass(frozen=True, eq=False)
class StreamedSvd:
    """A :class:`passes.core.factor.Decomposition` of ``weight``, (g, O, K) of floats; ``spectra`` as in Factors."""

    geometries: tuple[Geometry, ...]
    weight: Array
    spectra: Array

    @classmethod
    def of(cls, format: FactorFormat, stage: Stage) -> StreamedSvd:
        weight = stage.grouped_weight()
        weight = weight.reshape(*weight.shape[:2], -1)
        return cls(format.geometries(stage.geometry), weight, np.stack([_spectrum(matrix) for matrix in weight]))

    @property
    def full_rank(self) -> Rank:
        return (int(self.spectra.shape[1]),)

    def loss(self, rank: Rank) -> float:
        return float(self.spectra[:, rank[0] :].sum())

    def energy(self) -> float:
        return float(self.spectra.sum())

    def stages(self, rank: Rank) -> tuple[Stage, ...]:
        """The chain at ``rank``, float32, its weights mapped."""
        groups, out, width = self.weight.shape
        (r,) = rank
        if not 1 <= r <= self.full_rank[0]:
            raise ValueError(f"rank {rank} is not within 1 and {self.full_rank}")
        inner = unwritten((groups, r, width), np.float32)
        outer = unwritten((groups, out, r), np.float32)
        for matrix, left, right in zip(self.weight, outer, inner, strict=True):
            _split(matrix, left, right)
        first, second = self.geometries
        shape = (groups * r, width // int(np.prod(first.kernel)), *first.kernel)
        return (
            Stage(inner.reshape(shape), None, first),
            Stage(outer.reshape(groups * out, r, *second.kernel), None, second),
        )


def _spectrum(matrix: Array) -> Array:
    """All squared singular values, falling, float64."""
    values = eigh(_gram(matrix), eigvals_only=True, overwrite_a=True, check_finite=False, driver="ev")
    return np.maximum(values[::-1].astype(np.float64), 0)


def _split(matrix: Array, left: Array, right: Array) -> None:
    """Fills ``left`` (O, r) and ``right`` (r, K), whose product is the best of rank r for ``matrix`` (O, K)."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix, left, right = matrix.T, right.T, left.T
    gram = _gram(matrix)
    count, rank = len(gram), left.shape[1]
    wanted = [count - rank, count - 1]
    _, vectors = eigh(gram, subset_by_index=wanted, overwrite_a=True, check_finite=False, driver="evr")
    del gram
    basis = np.ascontiguousarray(vectors[:, ::-1], dtype=np.float32)
    del vectors
    left[...] = basis
    release(left)
    # whichever way the weight lies in its file, blocks of it are rows or columns that lie together
    if matrix.flags.c_contiguous:
        for rows in _ranges(rank):
            np.matmul(basis[:, rows].T, matrix, out=right[rows])
            release(right)
        release(matrix)
    else:
        for columns in _ranges(matrix.shape[1]):
            right[:, columns] = np.matmul(basis.T, matrix[:, columns])
            release(right)
            release(matrix)


def _gram(matrix: Array) -> Array:
    """The lower triangle of ``matrix @ matrix.T`` or of ``matrix.T @ matrix``, whichever is smaller, in Fortran order.

    Double precision where that takes no more than half of what the matrix does.
    """
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    count = len(matrix)
    dtype = np.float64 if 16 * count * count <= matrix.nbytes else np.float32
    gram = np.zeros((count, count), dtype, order="F")
    if matrix.flags.c_contiguous:
        blocks = list(_ranges(count))
        for index, rows in enumerate(blocks):
            block = matrix[rows].astype(dtype)
            for others in blocks[: index + 1]:
                other = block if others == rows else matrix[others].astype(dtype)
                gram[rows, others] = np.matmul(block, other.T)
                release(matrix)
        return gram
    add = get_blas_funcs("syrk", [gram])
    for columns in _ranges(matrix.shape[1]):
        part = np.asfortranarray(matrix[:, columns], dtype=dtype)
        gram = add(1.0, part, beta=1.0, c=gram, lower=1, overwrite_c=1)
        release(matrix)
    return gram


def _ranges(size: int) -> Iterator[slice]:
    step = -(-size // _BLOCKS)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
