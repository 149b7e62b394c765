"""What an operator or a network costs, and who says so.

``passes`` never imports a target. It is handed a :class:`LatencyModel` and asks it in batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from typing import Protocol

from passes.core.site import Chain, Geometry, Site


class Kind(StrEnum):
    """Where a number comes from. A sum is as weak as its weakest part."""

    MEASURED = "measured"
    SIMULATED = "simulated"
    ESTIMATED = "estimated"

    def weaker(self, other: Kind) -> Kind:
        order = [Kind.MEASURED, Kind.SIMULATED, Kind.ESTIMATED]
        return max(self, other, key=order.index)


METRICS = ("latency", "energy", "macs", "params", "size")
"""Everything a budget can limit: latency (cycles or seconds), energy (pJ), MACs, parameters, weight bytes."""


@dataclass(frozen=True)
class Cost:
    """Cost of an operator, a chain or a network on one target, per inference.

    ``latency`` is in ``unit`` ("cycles" or "s"); ``energy_pj`` in picojoules; ``dram_bytes`` moved to and from
    external memory. ``params`` and ``size_bytes`` describe the weights as the network file stores them.
    """

    latency: float = 0.0
    unit: str = "cycles"
    energy_pj: float = 0.0
    dram_bytes: int = 0
    macs: int = 0
    params: int = 0
    size_bytes: int = 0
    kind: Kind = Kind.ESTIMATED

    def __add__(self, other: Cost) -> Cost:
        if self.unit != other.unit:
            raise ValueError(f"cannot add a latency in {other.unit} to one in {self.unit}")
        return Cost(
            self.latency + other.latency,
            self.unit,
            self.energy_pj + other.energy_pj,
            self.dram_bytes + other.dram_bytes,
            self.macs + other.macs,
            self.params + other.params,
            self.size_bytes + other.size_bytes,
            self.kind.weaker(other.kind),
        )

    def metric(self, name: str) -> float:
        """The value a budget on ``name`` (one of :data:`METRICS`) is compared with."""
        values = {
            "latency": self.latency,
            "energy": self.energy_pj,
            "macs": float(self.macs),
            "params": float(self.params),
            "size": float(self.size_bytes),
        }
        return values[name]

    def with_weights(self, params: int, size_bytes: int) -> Cost:
        return replace(self, params=params, size_bytes=size_bytes)


@dataclass(frozen=True)
class StageWork:
    """The work of one conv or linear stage, as a price list sees it: shapes and no values.

    ``batch`` counts images of a convolution, rows of a linear layer; ``spatial`` is the input's.
    """

    geometry: Geometry
    in_channels: int
    out_channels: int
    spatial: tuple[int, ...] = ()
    batch: int = 1
    bias: bool = True

    @property
    def output_spatial(self) -> tuple[int, ...]:
        return self.geometry.output_spatial(self.spatial)

    @property
    def weights(self) -> int:
        """Number of weights, biases apart."""
        return self.out_channels * (self.in_channels // self.geometry.groups) * prod(self.geometry.kernel)

    @property
    def macs(self) -> int:
        """Multiply-adds per inference; bias adds are not counted."""
        positions = self.spatial if self.geometry.transposed else self.output_spatial
        return self.batch * prod(positions) * self.weights


@dataclass(frozen=True)
class OpWork:
    """One node of a whole network: ``stages`` is not empty for conv and linear nodes (one stage each).

    ``input_shapes`` holds the shapes of the activations read (weights left out), ``output_shapes`` those written.
    ``weight_bytes`` counts what the node's constants take in the file, ``weight_params`` how many numbers they are.
    ``inputs``/``outputs`` name the tensors, so that a target can see what is fused with what.
    """

    name: str
    op: str
    stage: StageWork | None
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    weight_params: int = 0
    weight_bytes: int = 0


class LatencyModel(Protocol):
    """A target's price list. Implementations cache; callers batch."""

    unit: str
    """"cycles" or "s"."""

    margin: float
    """Relative gain below which a change counts as noise: 0 where the price is exact."""

    granularity: int
    """A rank step worth looking at; the solver prices every rank on it and snaps to the latency staircase."""

    def chains(self, works: Sequence[tuple[StageWork, ...]]) -> list[Cost]:
        """Cost of each chain, its stages run one after another; latency in ``unit``."""
        ...

    def network(self, ops: Sequence[OpWork]) -> Cost:
        """Cost of a whole network, with whatever the target fuses; latency in ``unit``."""
        ...

    def floor(self, ops: Sequence[OpWork], options: Mapping[str, Sequence[tuple[StageWork, ...]]]) -> Cost:
        """What no plan gets below: :meth:`network` costs at least this in latency, energy and DRAM bytes, each alone.

        A plan puts one of ``options[name]``, run one stage after another, in the place of each op of that name; ops
        that ``options`` does not name stay as they are. MACs, params and size are not bounded: 0.
        """
        ...


def additive_floor(
    model: LatencyModel, ops: Sequence[OpWork], options: Mapping[str, Sequence[tuple[StageWork, ...]]]
) -> Cost:
    """:meth:`LatencyModel.floor` of a target whose networks cost the sum of their operators: the sum of the minima."""
    total = Cost(unit=model.unit, kind=Kind.MEASURED)
    for op in ops:
        costs = model.chains(options[op.name]) if op.name in options else [model.network([op])]
        total += least_cost(costs)
    return total


def least_cost(costs: Sequence[Cost]) -> Cost:
    """The least latency, energy and DRAM bytes of ``costs``, each alone; ValueError if there are none."""
    return Cost(
        latency=min(c.latency for c in costs),
        unit=costs[0].unit,
        energy_pj=min(c.energy_pj for c in costs),
        dram_bytes=min(c.dram_bytes for c in costs),
        kind=max((c.kind for c in costs), key=list(Kind).index),
    )


def chain_work(chain: Chain, site: Site) -> tuple[StageWork, ...]:
    """The chain's stages as work at this site."""
    sizes = chain.shapes(site.spatial)
    return tuple(
        StageWork(s.geometry, s.in_channels, s.out_channels, size, site.batch, s.bias is not None)
        for s, size in zip(chain.stages, sizes, strict=False)
    )
