"""The price list of one machine: layers, chains and vector operations, asked for in batches, each shape searched once.

A chain may keep the maps between its stages on chip. A map stays if it fits the scratchpad as a whole beside the
tiles of the stage that writes it and, later, of the stage that reads it; then it is neither stored nor loaded. Which
maps stay is chosen per boundary, the best of all combinations; "layer by layer" is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from accel_sim.energy import dram_bytes, layer_energies_pj
from accel_sim.pricing.layer import Layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.search import price_layers
from accel_sim.pricing.vector import price_vectors
from accel_sim.spec import MachineSpec


class NoTilingError(ValueError):
    """No tiling of a layer fits the machine's memories."""


@dataclass(frozen=True, eq=False)
class LayerPrice:
    """One layer's price: ``record`` is one :data:`accel_sim.pricing.candidate.PRICE`, with the chosen tiling."""

    layer: Layer
    record: Any
    input_on_chip: bool
    output_on_chip: bool
    energy_pj: float

    @property
    def cycles(self) -> int:
        return int(self.record["cycles"])

    @property
    def dram_bytes(self) -> int:
        return int(dram_bytes(self.record))


@dataclass(frozen=True, eq=False)
class ChainPrice:
    """A chain's price; ``stages`` say for each boundary whether the map stays on chip."""

    stages: tuple[LayerPrice, ...]
    layerwise_cycles: int
    layerwise_dram_bytes: int

    @property
    def cycles(self) -> int:
        return sum(stage.cycles for stage in self.stages)

    @property
    def dram_bytes(self) -> int:
        return sum(stage.dram_bytes for stage in self.stages)

    @property
    def energy_pj(self) -> float:
        return sum(stage.energy_pj for stage in self.stages)

    @property
    def fused(self) -> bool:
        """Whether any map between two stages stays on chip."""
        return any(stage.output_on_chip for stage in self.stages)


class _Searched(NamedTuple):
    """What the search found for a row: cycles, -1 where no tiling fits, DRAM bytes, pJ, and the whole record."""

    cycles: int
    dram_bytes: int
    energy_pj: float
    record: Any


_Path: TypeAlias = tuple[int, int, tuple[tuple[bool, bool, _Searched], ...]]
"""Cycles and DRAM bytes of a chain's first stages, and for each whether its input and its output stay on chip."""


@dataclass(frozen=True)
class VectorPrice:
    cycles: int
    dram_bytes: int
    chunks: int


def join(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tables of :meth:`PriceList.least` for two chains in a row, as one: the map between them stays or does not."""
    joined: NDArray[np.float64] = (first[:, :, None, :] + second[None, :, :, :]).min(axis=1)
    return joined


class PriceList:
    """Prices of one machine, cached by shape. Not for several threads at once.

    ``maps_on_chip`` False: all maps go through DRAM, layer by layer, so that it shows what the others save.
    """

    def __init__(self, spec: MachineSpec, maps_on_chip: bool = True) -> None:
        self.spec = spec
        self.maps_on_chip = maps_on_chip
        self.machine = machine_record(spec)
        self._layers: dict[tuple[int, ...], _Searched] = {}
        self._vectors: dict[tuple[int, int, int, int], VectorPrice] = {}

    def layers(self, layers: Sequence[Layer]) -> list[LayerPrice]:
        """Each layer on its own, its maps in DRAM. Raises :class:`NoTilingError`."""
        return [chain.stages[0] for chain in self.chains([(layer,) for layer in layers])]

    def chains(self, chains: Sequence[Sequence[Layer]]) -> list[ChainPrice]:
        """Each chain with the best choice of maps that stay on chip; only a last layer may have a residual.

        Raises :class:`NoTilingError`.
        """
        self._search(row for chain in chains for variants in self._variants(chain) for row in variants.values())
        return [self._best(chain) for chain in chains]

    def least(self, chains: Sequence[Sequence[Layer]], before: bool, after: bool) -> list[NDArray[np.float64]]:
        """What no choice of maps that stay on chip gets below, per chain and for each way it may be joined to others.

        Gives (2, 2, 3) arrays: fewest cycles, least energy in pJ, fewest DRAM bytes, each for itself; by whether the
        map before the chain is on chip, then the one after it; inf where that is impossible. ``before``/``after``:
        whether these maps may be; else that half is inf throughout.
        """
        variants = [self._variants(chain, before, after) for chain in chains]
        self._search(row for stages in variants for rows in stages for row in rows.values())
        known: dict[tuple[int, ...], NDArray[np.float64]] = {}
        found = []
        for stages in variants:
            joined: NDArray[np.float64] | None = None
            for rows in stages:
                table = np.full((2, 2, 3), np.inf)
                for (first, last), row in rows.items():
                    if row not in known:
                        known[row] = self._metrics(row)
                    table[int(first), int(last)] = known[row]
                joined = table if joined is None else join(joined, table)
            assert joined is not None, "a chain has at least one stage"
            found.append(joined)
        return found

    def vectors(self, works: Sequence[tuple[int, int, int, int]]) -> list[VectorPrice]:
        """Operations given as (bytes read of a first and of a second operand, bytes written, elementary operations).

        Raises :class:`NoTilingError`.
        """
        new = [work for work in dict.fromkeys(works) if work not in self._vectors]
        if new:
            for work, (cycles, moved, chunks) in zip(
                new, price_vectors(np.array(new, np.int64), self.machine).tolist(), strict=True
            ):
                if cycles < 0:
                    amount = f"a vector operation on {work[0] + work[1]} bytes"
                    raise NoTilingError(f"{amount} fits the memories of {self.spec.name} in no cut")
                self._vectors[work] = VectorPrice(cycles, moved, chunks)
        return [self._vectors[work] for work in works]

    def _metrics(self, row: tuple[int, ...]) -> NDArray[np.float64]:
        """(cycles, pJ, DRAM bytes) of a row that was searched; inf where no tiling fits."""
        found = self._layers[row]
        return np.array([found.cycles, found.energy_pj, found.dram_bytes] if found.cycles >= 0 else [np.inf] * 3, float)

    def _variants(
        self, chain: Sequence[Layer], open_before: bool = False, open_after: bool = False
    ) -> list[dict[tuple[bool, bool], tuple[int, ...]]]:
        """Per stage, the table rows by (input stays, output stays); the outer maps only where the ends are open."""
        data_bytes = self.spec.datatypes.data_bytes
        variants = []
        for i, layer in enumerate(chain):
            rows = {}
            may_stay = self.maps_on_chip and (i + 1 < len(chain) or open_after) and not layer.residual
            for before in (False, True) if self.maps_on_chip and (i or open_before) else (False,):
                for after in (False, True) if may_stay else (False,):
                    kept = before * layer.input_elements + after * layer.output_elements
                    rows[before, after] = layer.row(before, after, kept * data_bytes)
            variants.append(rows)
        return variants

    def _search(self, rows: Iterable[tuple[int, ...]]) -> None:
        new = [row for row in dict.fromkeys(rows) if row not in self._layers]
        if new:
            layers = layer_table(new)
            prices: NDArray[Any] = price_layers(layers, self.machine)
            moved, energies = dram_bytes(prices), layer_energies_pj(self.spec, prices, layers["macs"])
            found = map(_Searched, prices["cycles"].tolist(), moved.tolist(), energies.tolist(), prices)
            self._layers.update(zip(new, found, strict=True))

    def _best(self, chain: Sequence[Layer]) -> ChainPrice:
        # Shortest path over the boundaries; the state is whether the map just written stays.
        paths: dict[bool, _Path] = {False: (0, 0, ())}
        layerwise = [0, 0]
        for i, (layer, rows) in enumerate(zip(chain, self._variants(chain), strict=True)):
            longer: dict[bool, _Path] = {}
            for (before, after), row in rows.items():
                found = self._layers[row]
                if found.cycles < 0 or before not in paths:
                    continue
                cycles, moved, stages = paths[before]
                path = (cycles + found.cycles, moved + found.dram_bytes, (*stages, (before, after, found)))
                if after not in longer or path[:2] < longer[after][:2]:
                    longer[after] = path
                if not before and not after:
                    layerwise[0] += found.cycles
                    layerwise[1] += found.dram_bytes
            if False not in longer:
                raise NoTilingError(f"no tiling of stage {i} fits the memories of {self.spec.name}: {layer}")
            paths = longer
        best = tuple(
            LayerPrice(layer, found.record, before, after, found.energy_pj)
            for layer, (before, after, found) in zip(chain, paths[False][2], strict=True)
        )
        return ChainPrice(best, layerwise[0], layerwise[1])
