"""SCALE-Sim's compute model, reproduced as closed forms, for comparison only: prices never come from here.

Derived from the reports of SCALE-Sim 3.0.0 (scalesim-project/SCALE-Sim). Its conventions: no padding; output sizes
rounded up; cycles are the index of the last one, hence the -1; weight load and compute never overlap; for
output-stationary arrays the drain of R cycles is missing, and R + C writes are added per fold. Its stalls come from
its memory model and are not reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleSimCounts:
    """Compute cycles without stalls; words read from and written to the three scratchpads."""

    cycles: int
    input_reads: int
    filter_reads: int
    output_writes: int


def output_size(size: int, kernel: int, stride: int) -> int:
    """SCALE-Sim's output size along an axis: valid convolution, rounded up."""
    return -(-(size - kernel + stride) // stride)


def scalesim_counts(dataflow: str, rows: int, columns: int, m: int, k: int, n: int) -> ScaleSimCounts:
    """Counts for M = output positions, K = taps x channels, N = filters; ``dataflow`` is "ws", "os" or "is".

    Raises ValueError for another dataflow.
    """
    if dataflow == "ws":
        folds = _folds(k, rows) * _folds(n, columns)
        cycles = folds * (2 * rows + columns + m - 2) - 1
        return ScaleSimCounts(cycles, m * k * _folds(n, columns), k * n, m * n * _folds(k, rows))
    if dataflow == "is":
        folds = _folds(k, rows) * _folds(m, columns)
        cycles = folds * (2 * rows + columns + n - 2) - 1
        return ScaleSimCounts(cycles, m * k, k * n * _folds(m, columns), m * n * _folds(k, rows))
    if dataflow == "os":
        folds = _folds(m, rows) * _folds(n, columns)
        cycles = folds * (k + rows + columns - 2) - 1
        writes = m * n + folds * (rows + columns)
        return ScaleSimCounts(cycles, m * k * _folds(n, columns), k * n * _folds(m, rows), writes)
    raise ValueError(f"SCALE-Sim has no dataflow {dataflow!r}: give ws, os or is")


def _folds(size: int, side: int) -> int:
    return -(-size // side)
