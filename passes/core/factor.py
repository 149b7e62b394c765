"""What a low-rank format is: one decomposition per site, from which slices give the chain of every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from passes.core.alternate import alternate, refit_tail, separable
from passes.core.fit import FitProblem
from passes.core.site import Array, Chain, Geometry, Stage

Rank = tuple[int, ...]


class Decomposition(Protocol):
    """A site's factors at full rank, ordered by importance."""

    @property
    def full_rank(self) -> Rank:
        """The largest rank of each kind; the chain of this rank is exact."""
        ...

    def loss(self, rank: Rank) -> float:
        """The error of the slice at ``rank`` as its spectra tell it, without forming it: the discarded part.

        Exact where one factor sees the whole patch; elsewhere in the separated metric, and a bound for two ranks.
        """
        ...

    def stages(self, rank: Rank) -> tuple[Stage, ...]:
        """The chain's stages at ``rank``, float64, with no bias; its weights are slices of the decomposition."""
        ...


class FactorFormat(Protocol):
    """A way to write a stage as a chain. Stateless; arrays only."""

    @property
    def name(self) -> str: ...

    def full_rank(self, stage: Stage) -> Rank | None:
        """The largest rank per group, or None where the format does not apply to the stage."""
        ...

    def geometries(self, geometry: Geometry) -> tuple[Geometry, ...]:
        """The geometry of each stage of the chain; together they walk as the one given."""
        ...

    def widths(self, rank: Rank) -> tuple[int, ...]:
        """Channels per group between the stages."""
        ...

    def decompose(self, geometry: Geometry, problem: FitProblem) -> Decomposition: ...


@dataclass(frozen=True, eq=False)
class Factors:
    """A decomposition held as full-size stages with grouped weights (g, out, in, *kernel), sliced along ranks.

    ``spectra``: per rank axis the squared singular values (g, R) that order it.
    """

    geometries: tuple[Geometry, ...]
    weights: tuple[Array, ...]
    spectra: tuple[Array, ...]

    @property
    def full_rank(self) -> Rank:
        return tuple(int(w.shape[1]) for w in self.weights[:-1])

    def loss(self, rank: Rank) -> float:
        return float(sum(s[:, r:].sum() for s, r in zip(self.spectra, rank, strict=True)))

    def stages(self, rank: Rank) -> tuple[Stage, ...]:
        if len(rank) != len(self.full_rank) or not all(1 <= r <= f for r, f in zip(rank, self.full_rank, strict=True)):
            raise ValueError(f"rank {rank} is not within 1 and {self.full_rank}")
        ins = (self.weights[0].shape[2], *rank)
        outs = (*rank, self.weights[-1].shape[1])
        stages = []
        for geometry, weight, i, o in zip(self.geometries, self.weights, ins, outs, strict=True):
            part = weight[:, :o, :i]
            stages.append(Stage(part.reshape(part.shape[0] * o, i, *part.shape[3:]), None, geometry))
        return tuple(stages)


def fitted(
    decomposition: Decomposition, rank: Rank, problem: FitProblem, rounds: int, steps: int = 8
) -> tuple[Stage, ...]:
    """The slice at ``rank`` of a decomposition of this very problem, its factors fitted to the problem.

    A slice whose first factor sees the whole patch is the optimum already. Others get their tail in closed form and
    ``rounds`` of alternation, as far as :func:`passes.core.alternate.affordable_rounds` lets them.
    """
    stages = decomposition.stages(rank)
    if len(stages) == 2 and not separable(stages):
        return stages
    return alternate(refit_tail(stages, problem), problem, rounds, steps)


def chain_of(name: str, rank: Rank, stages: tuple[Stage, ...], bias: Array | None) -> Chain:
    """A float32 chain with ``bias`` (O,) on its last stage."""
    narrow = [replace(s, weight=np.ascontiguousarray(s.weight, dtype=np.float32)) for s in stages]
    if bias is not None:
        narrow[-1] = replace(narrow[-1], bias=np.ascontiguousarray(bias, dtype=np.float32))
    return Chain(tuple(narrow), name, rank)


@lru_cache(1024)
def axis_geometry(geometry: Geometry, axes: frozenset[int]) -> Geometry:
    """The part of a geometry that walks along ``axes``; along the others it is pointwise."""
    n = geometry.ndim

    def pick(values: tuple[int, ...], default: int) -> tuple[int, ...]:
        return tuple(v if a % n in axes else default for a, v in enumerate(values)) if n else values

    return Geometry(
        pick(geometry.kernel, 1),
        pick(geometry.strides, 1),
        pick(geometry.dilations, 1),
        pick(geometry.pads, 0),
        geometry.groups,
        geometry.transposed,
        pick(geometry.output_padding, 0),
    )


def pointwise_like(geometry: Geometry) -> Geometry:
    """A pointwise stage beside ``geometry``: same number of axes and groups, never transposed."""
    return Geometry.pointwise(geometry.ndim, geometry.groups)
