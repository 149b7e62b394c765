"""Closed forms of the array against arrays simulated register by register, cycle by cycle, values included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.pricing.array import (
    INPUT_STATIONARY,
    OUTPUT_STATIONARY,
    WEIGHT_STATIONARY,
    gemm_accumulator_writes,
    gemm_cycles_batch,
    gemm_input_reads,
    gemm_weight_reads,
)
from accel_sim.pricing.machine import machine_record
from accel_sim.spec_file import load_spec


class WeightStationary:
    """R x C elements; inputs travel right, partial sums and weight words travel down, one register per element each.

    A weight word names the row that keeps it in its shadow register. An input that carries the swap flag makes the
    element take its shadow register before it multiplies.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.x = np.zeros((rows, columns), np.int64)
        self.swap = np.zeros((rows, columns), bool)
        self.sum = np.zeros((rows, columns), np.int64)
        self.word = np.zeros((rows, columns), np.int64)
        self.target = np.full((rows, columns), -1)
        self.active = np.zeros((rows, columns), np.int64)
        self.shadow = np.zeros((rows, columns), np.int64)
        self.reads = self.weight_reads = 0

    def cycle(self, x: Any, swap: Any, word: Any, target: Any) -> np.ndarray:
        """One clock edge; gives what the bottom row's registers hold afterwards."""
        x_in = np.column_stack([x, self.x[:, :-1]])
        swap_in = np.column_stack([swap, self.swap[:, :-1]])
        sum_in = np.vstack([np.zeros(self.columns, np.int64), self.sum[:-1]])
        word_in = np.vstack([word, self.word[:-1]])
        target_in = np.vstack([target, self.target[:-1]])
        self.active = np.where(swap_in, self.shadow, self.active)
        keep = target_in == np.arange(self.rows)[:, None]
        self.shadow = np.where(keep, word_in, self.shadow)
        self.x, self.swap, self.sum = x_in, swap_in, sum_in + x_in * self.active
        self.word, self.target = word_in, np.where(keep, -1, target_in)
        return self.sum[-1].copy()


def run_weight_stationary(
    a: np.ndarray, b: np.ndarray, rows: int, columns: int, shadow: bool, hurry: int = 0
) -> tuple[int, np.ndarray]:
    """Cycles and product of a (M, K) and b (K, N). ``hurry`` starts each fold so many cycles earlier than it may."""
    m, k, n = len(a), a.shape[1], b.shape[1]
    folds = [(i, j) for j in range(0, n, columns) for i in range(0, k, rows)]
    array, out = WeightStationary(rows, columns), np.zeros((m, n), np.int64)
    loads, streams = [0], [rows]
    for _ in folds[1:]:
        if shadow:  # weights follow into the shadow registers as soon as a stream, which takes them over, begins
            loads.append(streams[-1])
            streams.append(streams[-1] + max(m, rows) - hurry)
        else:
            loads.append(streams[-1] + m + rows + columns - 1)
            streams.append(loads[-1] + rows - hurry)
    last = 0
    for now in range(streams[-1] + m + rows + columns):
        x, swap = np.zeros(rows, np.int64), np.zeros(rows, bool)
        word, target = np.zeros(columns, np.int64), np.full(columns, -1)
        for (i, j), load, stream in zip(folds, loads, streams, strict=True):
            for r in range(rows):
                step = now - stream - r
                if 0 <= step < m:
                    x[r] += a[step, i + r] if i + r < k else 0
                    swap[r] |= step == 0
            for c in range(columns):
                row = rows - 1 - (now - load - c)
                if 0 <= row < rows:
                    word[c] = b[i + row, j + c] if i + row < k and j + c < n else 0
                    target[c] = row
        bottom = array.cycle(x, swap, word, target)
        for (_, j), stream in zip(folds, streams, strict=True):
            for c in range(min(columns, n - j)):
                step = now - stream - (rows - 1) - c
                if 0 <= step < m:
                    out[step, j + c] += bottom[c]  # the accumulator adds up the folds of K
            if 0 <= now - stream - (rows - 1) - (columns - 1) < m:
                last = now
    return last + 2, out  # from an index to a number, and the write of the register that it was computed into


def run_output_stationary(
    a: np.ndarray, b: np.ndarray, rows: int, columns: int, overlap: bool, hurry: int = 0
) -> tuple[int, np.ndarray]:
    """As above for an array that keeps sums: a travels right, b down, results are shifted down and out."""
    m, k, n = len(a), a.shape[1], b.shape[1]
    folds = [(i, j) for j in range(0, n, columns) for i in range(0, m, rows)]
    shape, out = (rows, columns), np.zeros((m, n), np.int64)
    step = max(k, rows) if overlap else k + 2 * rows + columns - 2
    starts = [f * (step - hurry) for f in range(len(folds))]
    x, y, total, leaving = (np.zeros(shape, np.int64) for _ in range(4))
    last = 0
    for now in range(starts[-1] + k + 2 * rows + columns):
        left, top = np.zeros(rows, np.int64), np.zeros(columns, np.int64)
        fresh, done = np.zeros(shape, bool), np.zeros(shape, bool)
        shifts = np.zeros(shape, bool)
        for (i, j), start in zip(folds, starts, strict=True):
            for r in range(rows):
                if 0 <= now - start - r < k and i + r < m:
                    left[r] += a[i + r, now - start - r]
            for c in range(columns):
                if 0 <= now - start - c < k and j + c < n:
                    top[c] += b[now - start - c, j + c]
                ready = start + k + rows - 1 + (c if overlap else columns - 1)
                turn = now - ready
                if 0 <= turn < rows:
                    shifts[turn + 1 :, c] = True  # the rows above have nothing left of this tile
                    row = i + rows - 1 - turn
                    if row < m and j + c < n:
                        out[row, j + c] = leaving[rows - 1, c]
                    last = max(last, now)
            age = now - start - np.add.outer(np.arange(rows), np.arange(columns))
            fresh |= age == 0
            done |= age == k - 1
        moved = np.vstack([np.zeros(columns, np.int64), leaving[:-1]])
        leaving = np.where(shifts, moved, leaving)
        x, y = np.column_stack([left, x[:, :-1]]), np.vstack([top, y[:-1]])
        total = np.where(fresh, 0, total) + x * y
        leaving = np.where(done, total, leaving)
    return last + 1, out


def machine(rows: int, columns: int, shadow: bool = True, overlap: bool = True) -> np.ndarray:
    spec = load_spec("gemmini_16x16")
    array = replace(spec.array, rows=rows, columns=columns, weight_shadow=shadow, drain_overlap=overlap)
    return machine_record(replace(spec, array=array))


SIZES = {
    "rows": st.integers(1, 4),
    "columns": st.integers(1, 4),
    "m": st.integers(1, 9),
    "k": st.integers(1, 9),
    "n": st.integers(1, 9),
    "seed": st.integers(0, 999),
    "fast": st.booleans(),
}


def operands(m: int, k: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_weight_stationary_equals_the_registers(
    rows: int, columns: int, m: int, k: int, n: int, seed: int, fast: bool
) -> None:
    a, b = operands(m, k, n, seed)
    cycles, product = run_weight_stationary(a, b, rows, columns, shadow=fast)
    assert (product == a @ b).all()
    gemm = np.array([[m, k, n]])
    assert gemm_cycles_batch(machine(rows, columns, shadow=fast), WEIGHT_STATIONARY, gemm)[0] == cycles


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_input_stationary_is_weight_stationary_transposed(
    rows: int, columns: int, m: int, k: int, n: int, seed: int, fast: bool
) -> None:
    a, b = operands(m, k, n, seed)
    cycles, product = run_weight_stationary(b.T, a.T, rows, columns, shadow=fast)
    assert (a @ b == product.T).all()
    gemm = np.array([[m, k, n]])
    assert gemm_cycles_batch(machine(rows, columns, shadow=fast), INPUT_STATIONARY, gemm)[0] == cycles


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_output_stationary_equals_the_registers(
    rows: int, columns: int, m: int, k: int, n: int, seed: int, fast: bool
) -> None:
    a, b = operands(m, k, n, seed)
    cycles, product = run_output_stationary(a, b, rows, columns, overlap=fast)
    assert (product == a @ b).all()
    gemm = np.array([[m, k, n]])
    assert gemm_cycles_batch(machine(rows, columns, overlap=fast), OUTPUT_STATIONARY, gemm)[0] == cycles


@pytest.mark.parametrize(("m", "k"), [(7, 8), (2, 8), (3, 8)])
def test_a_fold_started_one_cycle_early_gives_wrong_values(m: int, k: int) -> None:
    """The interval of max(M, R) cycles is the least there is: inputs would collide, or weights come too late."""
    a, b = operands(m, k, 5, 1)
    assert (run_weight_stationary(a, b, 3, 3, shadow=True)[1] == a @ b).all()
    assert (run_weight_stationary(a, b, 3, 3, shadow=True, hurry=1)[1] != a @ b).any()


@pytest.mark.parametrize("k", [2, 3, 6])
def test_an_output_tile_started_one_cycle_early_gives_wrong_values(k: int) -> None:
    a, b = operands(8, k, 5, 2)
    assert (run_output_stationary(a, b, 3, 3, overlap=True)[1] == a @ b).all()
    assert (run_output_stationary(a, b, 3, 3, overlap=True, hurry=1)[1] != a @ b).any()


RTL = [  # 32x32; cycles counted in a Verilog simulation of the four arrays (layers of ResNet-18 without padding)
    ((12100, 147, 64), 121_950, 121_095, 182_678, 111_520),
    ((841, 64, 128), 7_488, 6_823, 17_064, 7_006),
    ((144, 2304, 256), 137_664, 83_039, 95_920, 92_254),
    ((25, 4608, 512), 276_480, 73_816, 75_232, 73_822),
    ((64, 256, 512), 20_352, 8_287, 11_200, 8_286),
]


@pytest.mark.parametrize(("gemm", "ws_serial", "ws_shadow", "os_serial", "os_overlap"), RTL)
def test_counts_of_a_verilog_simulation(
    gemm: tuple[int, int, int], ws_serial: int, ws_shadow: int, os_serial: int, os_overlap: int
) -> None:
    one = np.array([gemm])
    plain, fast = machine(32, 32, shadow=False, overlap=False), machine(32, 32)
    assert gemm_cycles_batch(plain, WEIGHT_STATIONARY, one)[0] == ws_serial
    assert gemm_cycles_batch(fast, WEIGHT_STATIONARY, one)[0] == ws_shadow
    assert gemm_cycles_batch(plain, OUTPUT_STATIONARY, one)[0] == os_serial
    assert gemm_cycles_batch(fast, OUTPUT_STATIONARY, one)[0] == os_overlap


def test_words_moved_per_dataflow() -> None:
    """A 4x3 array, M, K, N = 10, 9, 7: 3 folds of K, 3 folds of N, M in 3 folds of rows or 4 of columns."""
    assert gemm_input_reads(WEIGHT_STATIONARY, 4, 3, 10, 9, 7) == 90 * 3  # past every fold of N
    assert gemm_weight_reads(WEIGHT_STATIONARY, 4, 3, 10, 9, 7) == 63
    assert gemm_accumulator_writes(WEIGHT_STATIONARY, 4, 3, 10, 9, 7) == 70 * 3  # for every fold of K
    assert gemm_input_reads(OUTPUT_STATIONARY, 4, 3, 10, 9, 7) == 90 * 3
    assert gemm_weight_reads(OUTPUT_STATIONARY, 4, 3, 10, 9, 7) == 63 * 3
    assert gemm_accumulator_writes(OUTPUT_STATIONARY, 4, 3, 10, 9, 7) == 70
    assert gemm_input_reads(INPUT_STATIONARY, 4, 3, 10, 9, 7) == 90
    assert gemm_weight_reads(INPUT_STATIONARY, 4, 3, 10, 9, 7) == 63 * 4
    assert gemm_accumulator_writes(INPUT_STATIONARY, 4, 3, 10, 9, 7) == 70 * 3
