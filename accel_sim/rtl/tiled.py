"""Tiled products as step programs: the loads, products and stores of a GEMM that is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from accel_sim.pricing.array import OUTPUT_STATIONARY, WEIGHT_STATIONARY, gemm_cycles_batch
from accel_sim.pricing.machine import MACHINE
from accel_sim.rtl.cosim import TileProgram


def closed_form(unit: str, rows: int, columns: int, gemms: list[tuple[int, int, int]]) -> list[int]:
    """Cycles of products (M, K, N) on one of :data:`accel_sim.rtl.cosim.UNITS`, from the price list's closed forms."""
    machine = np.zeros(1, MACHINE)
    machine["rows"], machine["columns"] = rows, columns
    machine["weight_shadow"] = machine["drain_overlap"] = unit in ("ws_shadow", "os_overlap")
    dataflow = WEIGHT_STATIONARY if unit.startswith("ws") else OUTPUT_STATIONARY
    return [int(cycles) for cycles in gemm_cycles_batch(machine, dataflow, np.array(gemms, np.int64).reshape(-1, 3))]


@dataclass(frozen=True)
class Step:
    """Ranges of one step's product, what of its operands it loads, and whether its output tile ends."""

    rows: slice
    inner: slice
    columns: slice
    loads_left: bool
    loads_top: bool
    ends: bool

    @property
    def gemm(self) -> tuple[int, int, int]:
        m, k, n = (part.stop - part.start for part in (self.rows, self.inner, self.columns))
        return m, k, n

    @property
    def load_bytes(self) -> int:
        m, k, n = self.gemm
        return m * k * self.loads_left + k * n * self.loads_top

    @property
    def store_bytes(self) -> int:
        m, _, n = self.gemm
        return m * n * self.ends


@dataclass(frozen=True)
class TiledGemm:
    """An M x K x N product of int8, its tiling, and the machine that it runs on.

    Tiles along K are innermost; ``columns_first`` 1: all tiles of rows for one tile of columns, then the next, 0: the
    other way round. ``hold`` 1: an operand that the step before used as well is not loaded again. ``rate`` and
    ``way_rate`` as in :class:`~accel_sim.rtl.cosim.TileProgram`.
    """

    unit: str
    rows: int
    columns: int
    m: int
    k: int
    n: int
    tile_m: int
    tile_k: int
    tile_n: int
    columns_first: int
    hold: int
    buffers: int
    latency_cycles: int
    rate: int
    way_rate: int
    pipelined: int
    store_on_channel: int

    def steps(self) -> list[Step]:
        """The steps in order."""
        outer, inner = (self._cuts(self.n, self.tile_n), self._cuts(self.m, self.tile_m))
        if not self.columns_first:
            outer, inner = inner, outer
        steps: list[Step] = []
        left = top = None
        for a in outer:
            for b in inner:
                rows, columns = (b, a) if self.columns_first else (a, b)
                for k in self._cuts(self.k, self.tile_k):
                    loads = (not self.hold or left != (rows, k), not self.hold or top != (k, columns))
                    steps.append(Step(rows, k, columns, *loads, ends=k.stop == self.k))
                    left, top = (rows, k), (k, columns)
        return steps

    def program(self, load_first_on_ties: bool = False) -> TileProgram:
        """The program with compute times from the closed forms."""
        steps = self.steps()
        return TileProgram(
            np.array([step.load_bytes for step in steps], np.int64),
            np.array(closed_form(self.unit, self.rows, self.columns, [step.gemm for step in steps]), np.int64),
            np.array([step.store_bytes for step in steps], np.int64),
            *(self.buffers, self.latency_cycles, self.rate, self.way_rate),
            *(bool(self.pipelined), bool(self.store_on_channel), load_first_on_ties),
        )

    def slots(self) -> Iterator[tuple[int, int]]:
        """The operand buffers that each step reads, and fills where it loads: every load takes the next one."""
        left = top = self.buffers - 1
        for step in self.steps():
            left = (left + step.loads_left) % self.buffers
            top = (top + step.loads_top) % self.buffers
            yield left, top

    @staticmethod
    def _cuts(length: int, tile: int) -> list[slice]:
        return [slice(first, min(first + tile, length)) for first in range(0, length, tile)]
