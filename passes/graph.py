"""What a pass sees of a network, whatever format it came in.

A frontend reads nodes into stages or refuses them with a reason, and emits stages; it holds no mathematics.
A pass is written once against this contract and runs on every frontend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from passes.core.cost import OpWork
from passes.core.site import Chain, Site, Stage


@dataclass(frozen=True)
class Note:
    """What a pass or a frontend has to say of one node: ``reason`` is a sentence for a person."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class SiteScan:
    """Every conv, transposed conv, Gemm and MatMul of the network: either a site or a note why it is none."""

    sites: tuple[Site, ...]
    kept: tuple[Note, ...]


@dataclass(frozen=True)
class Affine:
    """A per-channel ``y * scale + shift`` node (a BatchNorm, say) that is the only reader of ``site``'s output."""

    node: str
    op: str
    site: Site
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the network. ``shape`` holds None where a dimension is symbolic; ``dtype`` is NumPy's."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Graph(Protocol):
    """A network under rewriting. Methods that change it keep its inputs and outputs: names, types and shapes."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def sites(self) -> SiteScan:
        """Sites in execution order, with concrete shapes, and what is kept with the reason."""
        ...

    def replace(self, site: Site, chain: Chain) -> None:
        """Puts ``chain`` where ``site`` stood, between the same tensors. New nodes are named after the site."""
        ...

    def affines(self) -> tuple[Affine, ...]:
        """Affine nodes that could be folded into the site before them."""
        ...

    def fold(self, affine: Affine, stage: Stage) -> None:
        """Replaces the affine's site by ``stage`` and removes the affine node."""
        ...

    def adjacent(self) -> tuple[tuple[Site, Site], ...]:
        """Pairs of sites where the second is the only reader of the first's output and nothing lies between."""
        ...

    def merge(self, first: Site, second: Site, stage: Stage) -> None:
        """Puts one ``stage`` in place of two adjacent sites."""
        ...

    def drop_identities(self) -> tuple[Note, ...]:
        """Removes nodes that pass their input on unchanged (Identity, Dropout, no-op Cast, ...); names them."""
        ...

    def drop_dead_code(self) -> tuple[Note, ...]:
        """Removes nodes and constants that no output depends on; names them."""
        ...

    def workload(self) -> tuple[OpWork, ...]:
        """Every node with concrete shapes, for pricing the whole network."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs for one set of inputs, computed by the reference runtime of the format."""
        ...

    def check(self) -> None:
        """Raises VerificationError when the network is not valid by its format's own checker."""
        ...

    def to_text(self) -> str:
        """A stable, readable listing: equal texts mean equal networks (weights by digest)."""
        ...

    def clone(self) -> Graph:
        """An independent copy; constants may be shared, since nobody writes into them."""
        ...


Feeds = Sequence[Mapping[str, NDArray[Any]]]
"""Batches of named input arrays."""
