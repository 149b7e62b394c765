"""The table of counts: what the SystemVerilog took for many products and programs, kept for places without a simulator.

    python -m accel_sim.rtl.counts FOLDER [--simulator verilator|icarus]

runs everything anew and writes ``gemm_counts.csv`` and ``pipeline_counts.csv`` into FOLDER. Each begins with a line
that names the simulator and the digest of the sources that it ran.
"""

from __future__ import annotations

import argparse
import csv
import zlib
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.rtl.build import choose, source_digest
from accel_sim.rtl.cosim import UNITS, ArrayShape, Gemm, run_gemms, run_programs
from accel_sim.rtl.tiled import TiledGemm

SHAPES = ((4, 4), (6, 5), (12, 14), (16, 16))
GEMM_COLUMNS = ("rows", "columns", "m", "k", "n", "crc", *UNITS)
"""Columns of ``gemm_counts.csv``: the array, the product, :func:`checksum` of it, cycles on the four units."""

PIPELINE_COLUMNS = (*(field.name for field in fields(TiledGemm)), "cycles", "cycles_load_first_on_ties")
"""Columns of ``pipeline_counts.csv``: the fields of :class:`TiledGemm`, cycles with either rule for ties."""

_PER_SHAPE = 120
_PROGRAMS = 800


def operands(m: int, k: int, n: int) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Operands (M, K) and (K, N), the same on every machine: bytes of splitmix64 from a seed made of M, K and N."""
    counter = np.arange(1, m * k + k * n + 1, dtype=np.uint64) + np.uint64((m << 42) + (k << 21) + n)
    z = counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = (z >> np.uint64(56)).astype(np.uint8).view(np.int8)
    return words[: m * k].reshape(m, k), words[m * k :].reshape(k, n)


def checksum(product: NDArray[Any]) -> int:
    """CRC-32 of a product as little-endian 32-bit integers, row by row."""
    return zlib.crc32(np.ascontiguousarray(product, "<i4").tobytes())


def gemm_sizes(rows: int, columns: int, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Sizes (M, K, N): those around the array's own, and ``count`` random ones up to 90 x 150 x 90."""
    near = [(1, 1, 1), (rows, rows, columns), (rows + 1, rows - 1, columns + 1), (rows - 1, rows + 1, columns - 1)]
    near += [(1, 3 * rows, 3 * columns), (3 * rows, 1, 3 * columns), (3 * rows, 3 * rows, 1), (2 * rows, rows, columns)]
    rng = np.random.default_rng([seed, rows, columns])
    random = [(int(m), int(k), int(n)) for m, k, n in rng.integers(1, (91, 151, 91), (count, 3))]
    return [*near, *random]


def tiled_gemms(count: int, seed: int, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[TiledGemm]:
    """Random tilings of random products on random machines: 1 to 64 bytes a cycle, latency 0 to 100."""
    rng = np.random.default_rng(seed)
    found: list[TiledGemm] = []
    while len(found) < count:
        m, k, n = (int(size) for size in rng.integers(1, (200, 300, 200)))
        tile_m, tile_k, tile_n = (int(rng.integers(1, size + 1)) for size in (m, k, n))
        if -(-m // tile_m) * -(-k // tile_k) * -(-n // tile_n) > 300:
            continue
        shape = shapes[int(rng.integers(len(shapes)))]
        flags = [int(flag) for flag in rng.integers(0, 2, 3)]
        bytes_per_cycle = float(rng.choice([1.0, 2.0, 4.0, 8.0, 16.0, 64.0, rng.uniform(1.0, 64.0)]))
        machine = (int(rng.choice([1, 2, 2, 2, 3])), int(rng.choice([0, 1, 7, int(rng.integers(0, 101))])))
        rates = (round(bytes_per_cycle * 256), 256 * shape[1])
        gemm = (m, k, n, tile_m, tile_k, tile_n, flags[0], flags[1])
        unit = UNITS[int(rng.integers(len(UNITS)))]
        on_channel = int(rng.random() < 0.75)
        found.append(TiledGemm(unit, *shape, *gemm, *machine, *rates, flags[2], on_channel))
    return found


def gemm_rows(shape: tuple[int, int], sizes: Sequence[tuple[int, int, int]], simulator: str | None) -> list[list[int]]:
    """Rows of :data:`GEMM_COLUMNS`, run now. The four units have to agree in the product."""
    pairs = [operands(*size) for size in sizes]
    runs = run_gemms(ArrayShape(*shape), [Gemm(unit, *pair) for pair in pairs for unit in UNITS], simulator)
    rows = []
    for at, size in enumerate(sizes):
        four = runs[4 * at : 4 * at + 4]
        sums = {checksum(each.product) for each in four}
        if len(sums) != 1:
            raise ValueError(f"{size} on {shape}: the units' products differ")
        rows.append([*shape, *size, sums.pop(), *(each.cycles for each in four)])
    return rows


def read_table(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The line about the sources, and the rows by column."""
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    return head, list(csv.DictReader(lines))


def _head(simulator: str, bench: str) -> str:
    return f"# {simulator}, sources {source_digest(bench)}"


def _write(path: Path, head: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [head, ",".join(columns), *(",".join(str(field) for field in row) for row in rows)]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def main() -> None:
    """Runs all cases and writes both tables."""
    parser = argparse.ArgumentParser(description="Writes the tables of counts from runs of the SystemVerilog.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--simulator", choices=("verilator", "icarus"))
    arguments = parser.parse_args()
    simulator = choose(arguments.simulator)
    rows = [row for shape in SHAPES for row in gemm_rows(shape, gemm_sizes(*shape, _PER_SHAPE, seed=1), simulator)]
    _write(arguments.folder / "gemm_counts.csv", _head(simulator, "gemm_bench"), GEMM_COLUMNS, rows)
    cases = tiled_gemms(_PROGRAMS, seed=2)
    cycles, other = (run_programs([case.program(ties) for case in cases], simulator) for ties in (False, True))
    table = [[*astuple(case), *counts] for case, *counts in zip(cases, cycles, other, strict=True)]
    _write(arguments.folder / "pipeline_counts.csv", _head(simulator, "pipeline_bench"), PIPELINE_COLUMNS, table)


if __name__ == "__main__":
    main()
