"""Cycles of one GEMM on the array, as closed forms, and the words that it moves.

With F stationary tiles ("folds") and T operands streamed past each of them, from the first weight or operand to the
last result written:

    weight-stationary   F = ceil(K/R) ceil(N/C), T = M    input-stationary   F = ceil(K/R) ceil(M/C), T = N
        loads, streams and drains in turn       F (2R + C + T - 1)
        next tile into shadow registers         R + (F-1) max(T, R) + T + R + C - 1
    output-stationary   F = ceil(M/R) ceil(N/C), T = K
        drains in turn                          F (2R + C + T - 2)
        drains while the next tile computes     (F-1) max(T, R) + T + 2R + C - 2

The array always runs at its full size: a fold that fills it in part takes as long as a full one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled

WEIGHT_STATIONARY, OUTPUT_STATIONARY, INPUT_STATIONARY = 0, 1, 2


@compiled
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@compiled
def gemm_cycles(machine: Any, dataflow: int, m: int, k: int, n: int) -> int:
    """Cycles of one M x K x N product on an empty array. Source: the forms above."""
    rows, columns = machine.rows, machine.columns
    if dataflow == OUTPUT_STATIONARY:
        folds = ceil_div(m, rows) * ceil_div(n, columns)
        if machine.drain_overlap:
            return int((folds - 1) * max(k, rows) + k + 2 * rows + columns - 2)
        return int(folds * (2 * rows + columns + k - 2))
    streamed = m if dataflow == WEIGHT_STATIONARY else n
    across = n if dataflow == WEIGHT_STATIONARY else m
    folds = ceil_div(k, rows) * ceil_div(across, columns)
    if machine.weight_shadow:
        return int(rows + (folds - 1) * max(streamed, rows) + streamed + rows + columns - 1)
    return int(folds * (2 * rows + columns + streamed - 1))


@compiled
def gemm_input_reads(dataflow: int, rows: int, columns: int, m: int, k: int, n: int) -> int:
    """Words read from the input scratchpad: once per fold that streams them, or once where they stay."""
    return m * k if dataflow == INPUT_STATIONARY else m * k * ceil_div(n, columns)


@compiled
def gemm_weight_reads(dataflow: int, rows: int, columns: int, m: int, k: int, n: int) -> int:
    """Words read from the weight scratchpad."""
    if dataflow == WEIGHT_STATIONARY:
        return k * n
    return k * n * ceil_div(m, rows if dataflow == OUTPUT_STATIONARY else columns)


@compiled
def gemm_accumulator_writes(dataflow: int, rows: int, columns: int, m: int, k: int, n: int) -> int:
    """Partial sums written to the accumulators: one set per fold of K, a single one where outputs stay in the array."""
    return m * n if dataflow == OUTPUT_STATIONARY else m * n * ceil_div(k, rows)


@compiled
def _gemm_cycles_each(machines: NDArray[Any], dataflow: int, gemms: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    machine = machines[0]
    for i in range(out.size):
        out[i] = gemm_cycles(machine, dataflow, gemms[i, 0], gemms[i, 1], gemms[i, 2])


def gemm_cycles_batch(machine: NDArray[Any], dataflow: int, gemms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cycles of many GEMMs: ``gemms`` is (count, 3) of M, K, N; gives (count,). No memory, no tiling."""
    out = np.empty(len(gemms), np.int64)
    _gemm_cycles_each(machine, dataflow, np.ascontiguousarray(gemms, np.int64), out)
    return out
