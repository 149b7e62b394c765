"""Tiled products on the whole machine in SystemVerilog: values from DRAM to DRAM, and cycles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.rtl.build import CosimulationError, executable
from accel_sim.rtl.cosim import UNITS, ArrayShape, GemmRun, operand_words, simulate, sums_of_words
from accel_sim.rtl.tiled import TiledGemm

_STEP_BITS = 10
_CAPACITY_BITS = 12


def run_machine(
    products: Sequence[tuple[TiledGemm, NDArray[Any], NDArray[Any]]], simulator: str | None = None
) -> list[GemmRun]:
    """Runs tiled products of ``a`` (M, K) and ``b`` (K, N), int8, all on one unit and array; stores over the channel.

    The result is put together from the tiles as they were stored. Raises
    :class:`~accel_sim.rtl.build.CosimulationError` as :func:`accel_sim.rtl.cosim.run_gemms` does.
    """
    (kind,) = {(tiling.unit, tiling.rows, tiling.columns) for tiling, _, _ in products}
    unit, shape = kind[0], ArrayShape(kind[1], kind[2])
    overlapped = unit in ("ws_shadow", "os_overlap")
    parameters = {
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "OUTPUT_STATIONARY": UNITS.index(unit) // 2,
        "WEIGHT_SHADOW": int(overlapped),
        "DRAIN_OVERLAP": int(overlapped),
        "STEP_BITS": _STEP_BITS,
        "CAPACITY_BITS": _CAPACITY_BITS,
    }
    requests = "".join(_request(tiling, shape, a, b) for tiling, a, b in products)
    lines = iter(simulate(executable("machine_bench", parameters, simulator), requests))
    runs = []
    for tiling, _, _ in products:
        product = np.zeros((tiling.m, tiling.n), np.int64)
        try:
            for step in (step for step in tiling.steps() if step.ends):
                m, _, n = step.gemm
                words = [bytes.fromhex(next(lines)) for _ in range(m * -(-n // shape.columns))]
                product[step.rows, step.columns] = sums_of_words(words, shape, m, n)
            runs.append(GemmRun(int(next(lines)), product))
        except (StopIteration, ValueError) as error:
            raise CosimulationError(f"{tiling}: the answer is cut off or undefined") from error
    return runs


def _request(tiling: TiledGemm, shape: ArrayShape, a: NDArray[Any], b: NDArray[Any]) -> str:
    steps = tiling.steps()
    table, left_words, top_words = [], [], []
    for step, (left_slot, top_slot) in zip(steps, tiling.slots(), strict=True):
        left_part, top_part = a[step.rows, step.inner], b[step.inner, step.columns]
        left = operand_words(left_part if tiling.unit.startswith("ws") else left_part.T, shape.rows, shape)
        top = operand_words(top_part, shape.columns, shape)
        m, _, n = step.gemm
        if max(len(left), len(top), m * -(-n // shape.columns)) > 1 << _CAPACITY_BITS:
            raise CosimulationError(f"{tiling}: a tile is larger than the bench's buffers")
        left, top = left * step.loads_left, top * step.loads_top
        table.append((*step.gemm, left_slot, top_slot, len(left), len(top), step.load_bytes, step.store_bytes))
        left_words += left
        top_words += top
    fits = max(len(left_words), len(top_words)) <= 16 << _CAPACITY_BITS and len(steps) < 1 << _STEP_BITS
    if not fits or not tiling.store_on_channel or not 1 <= tiling.buffers <= 3 or not 0 <= tiling.latency_cycles < 128:
        raise CosimulationError(f"{tiling}: larger than the bench, or stored past the channel")
    machine = (tiling.buffers, tiling.latency_cycles, tiling.rate, tiling.pipelined, 0)
    rows = [(len(steps), *machine, len(left_words), len(top_words)), *table]
    return "\n".join([*(" ".join(str(field) for field in row) for row in rows), *left_words, *top_words, ""])
