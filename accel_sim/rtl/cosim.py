"""Runs products and tile programs on the SystemVerilog of this folder and gives back values and cycles.

The benches read a file of requests and write one of answers; their formats stand in the heads of ``gemm_bench.sv`` and
``pipeline_bench.sv``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.rtl.build import CosimulationError, executable, run

UNITS = ("ws", "ws_shadow", "os", "os_overlap")
"""The four micro-architectures: weight-stationary in turn and with shadow weights, output-stationary in turn and with
overlapped drain. Input-stationary is weight-stationary with the operands swapped: :meth:`Gemm.input_stationary`."""

_CAPACITY_BITS = 14
_STEP_BITS = 14
_BEYOND = 0x55  # what lies in the memories beyond the edge of a product: the array has to mask it


@dataclass(frozen=True)
class ArrayShape:
    """Parameters of the array, as in a machine description."""

    rows: int
    columns: int
    data_bits: int = 8
    accumulator_bits: int = 32

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1 or self.data_bits not in (8, 16, 32):
            raise CosimulationError(f"{self}: rows and columns from 1 on, data_bits 8, 16 or 32")
        if self.accumulator_bits not in (16, 32, 48, 64) or self.accumulator_bits < self.data_bits:
            raise CosimulationError(f"{self}: accumulator_bits 16, 32, 48 or 64, no less than data_bits")


@dataclass(frozen=True)
class Gemm:
    """``a`` (M, K) times ``b`` (K, N), integers within the data's width, on one of :data:`UNITS`."""

    unit: str
    a: NDArray[Any]
    b: NDArray[Any]

    @staticmethod
    def input_stationary(a: NDArray[Any], b: NDArray[Any], shadow: bool) -> Gemm:
        """The product with ``a`` kept in the array; its result is the transposed one, (N, M)."""
        return Gemm("ws_shadow" if shadow else "ws", b.T, a.T)


@dataclass(frozen=True)
class GemmRun:
    """Cycles from the first word to the last result written, and the product (M, N), wrapped to the sums' width."""

    cycles: int
    product: NDArray[np.int64]


def run_gemms(shape: ArrayShape, gemms: Sequence[Gemm], simulator: str | None = None) -> list[GemmRun]:
    """Runs ``gemms`` one after the other on one instance of the array.

    Raises :class:`CosimulationError` where no simulator is installed, operands do not fit, or an answer is malformed.
    """
    requests = "".join(_request(shape, gemm) for gemm in gemms)
    parameters = {
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "DATA_BITS": shape.data_bits,
        "ACCUMULATOR_BITS": shape.accumulator_bits,
        "CAPACITY_BITS": _CAPACITY_BITS,
    }
    lines = iter(simulate(executable("gemm_bench", parameters, simulator), requests))
    runs = []
    for gemm in gemms:
        m, n = len(gemm.a), gemm.b.shape[1]
        words = m * -(-n // shape.columns)
        try:
            cycles, answered = (int(word) for word in next(lines).split())
            rows = [bytes.fromhex(next(lines)) for _ in range(words)]
        except (StopIteration, ValueError, RuntimeError) as error:
            raise CosimulationError(f"{gemm.unit} {m}x{len(gemm.b)}x{n}: the answer is cut off or undefined") from error
        if answered != words:
            raise CosimulationError(f"{gemm.unit} {m}x{len(gemm.b)}x{n}: {answered} words of results, not {words}")
        runs.append(GemmRun(cycles, sums_of_words(rows, shape, m, n)))
    return runs


def simulate(command: list[str], requests: str) -> list[str]:
    """The lines that a bench answers ``requests`` with."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "requests", Path(folder) / "answers"
        asked.write_text(requests)
        output = run([*command, f"+requests={asked}", f"+answers={answered}"], "the simulation")
        if not answered.exists():
            raise CosimulationError(f"the simulation wrote no answers:\n{output[-2000:]}")
        return answered.read_text().splitlines()


def _request(shape: ArrayShape, gemm: Gemm) -> str:
    if gemm.unit not in UNITS or gemm.a.ndim != 2 or gemm.b.ndim != 2 or gemm.a.shape[1] != gemm.b.shape[0]:
        raise CosimulationError(f"{gemm.unit}: no product of {gemm.a.shape} and {gemm.b.shape} on one of {UNITS}")
    (m, k), n = gemm.a.shape, gemm.b.shape[1]
    limit = 1 << (shape.data_bits - 1)
    for operand in (gemm.a, gemm.b):
        if operand.size == 0 or operand.min() < -limit or operand.max() >= limit:
            raise CosimulationError(
                f"{gemm.unit} {m}x{k}x{n}: an operand is empty or wider than {shape.data_bits} bits"
            )
    left = operand_words(gemm.a if gemm.unit.startswith("ws") else gemm.a.T, shape.rows, shape)
    top = operand_words(gemm.b, shape.columns, shape)
    if max(len(left), len(top), m * -(-n // shape.columns)) > 1 << _CAPACITY_BITS or max(m, k, n) >= 1 << 15:
        raise CosimulationError(f"{gemm.unit} {m}x{k}x{n}: larger than the bench's memories")
    head = f"{UNITS.index(gemm.unit)} {m} {k} {n} {len(left)} {len(top)}"
    return "\n".join([head, *left, *top, ""])


def operand_words(operand: NDArray[Any], lanes: int, shape: ArrayShape) -> list[str]:
    """(T, L) as hexadecimal words of ``lanes`` lanes: T words for the first lanes, T for the next, and so on."""
    length, width = operand.shape
    blocks = -(-width // lanes)
    padded = np.full((length, blocks * lanes), _BEYOND, f">i{shape.data_bits // 8}")
    padded[:, :width] = operand
    words = padded.reshape(length, blocks, lanes).transpose(1, 0, 2)[:, :, ::-1]  # lane 0 is the lowest, so the last
    text, digits = words.tobytes().hex(), lanes * shape.data_bits // 4
    return [text[i : i + digits] for i in range(0, len(text), digits)]


def sums_of_words(words: list[bytes], shape: ArrayShape, m: int, n: int) -> NDArray[np.int64]:
    """(m, n) sums from the accumulators' words, highest lane first: m words for the first columns, and so on."""
    size = shape.accumulator_bits // 8
    lanes = np.frombuffer(b"".join(words), np.uint8).reshape(-1, shape.columns, size)[:, ::-1]
    whole = np.where(lanes[:, :, :1] >= 128, np.uint8(255), np.uint8(0)).repeat(8, axis=2)
    whole[:, :, 8 - size :] = lanes
    sums = np.ascontiguousarray(whole).view(">i8")[:, :, 0].astype(np.int64)
    return sums.reshape(-1, m, shape.columns).transpose(1, 0, 2).reshape(m, -1)[:, :n]


@dataclass(frozen=True)
class TileProgram:
    """Steps of a tiled layer as the machine sees them, and the machine's memories.

    ``load_bytes``, ``compute_cycles``, ``store_bytes``: one entry per step; 0 for a step that loads nothing, or that
    ends no output tile. ``rate`` and ``way_rate``: of the DRAM channel and of the stores' own way to the scratchpad, in
    1/256 bytes per cycle. ``load_first_on_ties`` turns the arbiter's rule round, for comparison only.
    """

    load_bytes: NDArray[np.int64]
    compute_cycles: NDArray[np.int64]
    store_bytes: NDArray[np.int64]
    buffers: int
    latency_cycles: int
    rate: int
    way_rate: int
    pipelined: bool
    store_on_channel: bool
    load_first_on_ties: bool = False

    def load_cycles(self) -> NDArray[np.int64]:
        """Cycles that each load occupies the channel."""
        return -(-self.load_bytes * 256 // self.rate)

    def store_cycles(self) -> NDArray[np.int64]:
        """Cycles that each store occupies the channel, or its own way."""
        return -(-self.store_bytes * 256 // (self.rate if self.store_on_channel else self.way_rate))


def run_programs(programs: Sequence[TileProgram], simulator: str | None = None) -> list[int]:
    """Cycles of each program on the double-buffered machine. Raises as :func:`run_gemms` does."""
    requests = []
    for at, program in enumerate(programs):
        steps = np.stack([program.load_bytes, program.compute_cycles, program.store_bytes], axis=1)
        inside = bool((steps >= 0).all() and (steps < 1 << 24).all() and (program.compute_cycles > 0).all())
        rates = min(program.rate, program.way_rate), max(program.rate, program.way_rate)
        inside = inside and 0 < len(steps) < 1 << _STEP_BITS and 1 <= program.buffers <= 3 and rates[0] >= 1
        if not (inside and 0 <= program.latency_cycles < 128 and rates[1] < 1 << 31):
            raise CosimulationError(f"program {at}: a number is out of the bench's range")
        head = (program.buffers, program.latency_cycles, program.rate, program.way_rate, program.pipelined)
        flags = (program.store_on_channel, program.load_first_on_ties)
        requests.append(" ".join(str(int(field)) for field in (len(steps), *head, *flags)))
        requests += [f"{load} {compute} {store}" for load, compute, store in steps]
    command = executable("pipeline_bench", {"STEP_BITS": _STEP_BITS}, simulator)
    answers = simulate(command, "\n".join([*requests, ""]))
    if len(answers) != len(programs):
        raise CosimulationError(f"{len(answers)} answers to {len(programs)} programs")
    return [int(answer) for answer in answers]
