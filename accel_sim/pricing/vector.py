"""Operations without a GEMM: they stream through the vector unit, a chunk at a time, like the steps of a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div
from accel_sim.pricing.pipeline import pipeline_cycles
from accel_sim.pricing.tiling import burst_bytes, channel_cycles

_MOST_CHUNKS = 1 << 16


@compiled
def _share(total: int, chunks: int, i: int) -> int:
    return total * (i + 1) // chunks - total * i // chunks


@compiled
def _best_chunks(
    first_bytes: int, second_bytes: int, output_bytes: int, operations: int, machine: Any
) -> tuple[int, int, int]:
    """(cycles, DRAM bytes, chunks) of the best equal cut that fits the memories; cycles -1 where none does."""
    best_cycles, best_bytes, best_chunks = -1, 0, 0
    chunks = 1
    # Pieces of less than a burst are worth trying only where nothing larger finds room.
    while chunks <= _MOST_CHUNKS and (
        best_cycles < 0 or max(first_bytes + second_bytes, output_bytes) > machine.burst * (chunks // 2)
    ):
        held = min(machine.buffers, chunks)
        room = held * (ceil_div(first_bytes, chunks) + ceil_div(second_bytes, chunks)) <= machine.input_bytes
        if room and held * ceil_div(output_bytes, chunks) <= machine.accumulator_capacity:
            load = np.empty(chunks, np.int64)
            compute = np.empty(chunks, np.int64)
            store = np.empty(chunks, np.int64)
            moved = 0
            for i in range(chunks):
                inward = burst_bytes(_share(first_bytes, chunks, i), machine.burst)
                inward += burst_bytes(_share(second_bytes, chunks, i), machine.burst)
                outward = burst_bytes(_share(output_bytes, chunks, i), machine.burst)
                load[i] = channel_cycles(inward, machine.rate)
                compute[i] = ceil_div(_share(operations, chunks, i), machine.lanes)
                store[i] = channel_cycles(outward, machine.rate)
                moved += inward + outward
            cycles = pipeline_cycles(
                load, compute, store, chunks, machine.buffers, machine.latency, machine.pipelined, 1
            )
            if best_cycles < 0 or (cycles, moved) < (best_cycles, best_bytes):
                best_cycles, best_bytes, best_chunks = cycles, moved, chunks
        chunks *= 2
    return best_cycles, best_bytes, best_chunks


@compiled
def _vector_each(works: NDArray[np.int64], machine: NDArray[Any], out: NDArray[np.int64]) -> None:
    for i in range(len(works)):
        out[i, 0], out[i, 1], out[i, 2] = _best_chunks(works[i, 0], works[i, 1], works[i, 2], works[i, 3], machine[0])


def price_vectors(works: NDArray[np.int64], machine: NDArray[Any]) -> NDArray[np.int64]:
    """``works`` is (count, 4): bytes read of a first and of a second operand, bytes written, elementary operations.

    Gives (count, 3): cycles, DRAM bytes (whole bursts), chunks; cycles are -1 where even the smallest chunk finds no
    room.
    """
    out = np.empty((len(works), 3), np.int64)
    _vector_each(np.ascontiguousarray(works, np.int64), machine, out)
    return out
