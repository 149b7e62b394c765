"""Bytes that come from anywhere, as strided transfers: moves, layout changes, operands that are broadcast."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.program.isa import Loops
from codegen.asic_compile.transfers import MOST_LOOPS, Transfer

Array = NDArray[np.int64]


def gather(sources: Array, target: int) -> list[Transfer]:
    """Transfers that bring the bytes at the DRAM addresses ``sources``, in their order, to ``target`` and on.

    In the order of the sources, so that bytes that lie beside each other in DRAM move as one piece wherever they go;
    or in that of the targets, where it takes no more pieces. Runs of bytes first; then equal runs at equal distances
    become loops, up to three deep.
    """
    sources = np.ascontiguousarray(sources, np.int64)
    ordered = np.arange(len(sources))
    if _falls(sources):
        sorted_ = np.argsort(sources, kind="stable")
        if _breaks(sources, ordered) > _breaks(sources, sorted_):
            ordered = sorted_
    addresses, runs = np.empty((len(sources), 2), np.int64), np.empty(len(sources), np.int64)
    loops = np.empty((len(sources), 3, MOST_LOOPS), np.int64)
    pieces = _pieces(sources, ordered, target, addresses, runs, loops)
    found = zip(addresses[:pieces].tolist(), runs[:pieces].tolist(), loops[:pieces].tolist(), strict=True)
    return [Transfer(source, place, Loops(run, *map(tuple, kinds))) for (source, place), run, kinds in found]


@compiled
def _falls(addresses: Array) -> int:
    """How often an address is below the one before."""
    found = 0
    for i in range(1, addresses.size):
        found += addresses[i] < addresses[i - 1]
    return found


@compiled
def _breaks(addresses: Array, order: Array) -> int:
    """How often a byte does not follow on the one before in this order."""
    found = 0
    for i in range(1, order.size):
        found += addresses[order[i]] != addresses[order[i - 1]] + 1
    return found


@compiled
def _joined(addresses: Array, runs: Array) -> int:
    """Bytes that follow on each other on both sides become one piece; gives the number of pieces.

    ``addresses``: (source, target) of each byte, then of each piece; ``runs``: receives the pieces' bytes.
    """
    pieces = 0
    run = 0
    for i in range(len(addresses)):
        source, target = addresses[i]
        if run and source == addresses[pieces - 1, 0] + run and target == addresses[pieces - 1, 1] + run:
            run += 1
        else:
            run = 1
            addresses[pieces, 0], addresses[pieces, 1] = source, target
            pieces += 1
        runs[pieces - 1] = run
    return pieces


@compiled
def _equal(loops: Array, one: int, other: int) -> bool:
    for kind in range(loops.shape[1]):
        for depth in range(loops.shape[2]):
            if loops[one, kind, depth] != loops[other, kind, depth]:
                return False
    return True


@compiled
def _looped(addresses: Array, runs: Array, loops: Array, pieces: int) -> int:
    """Neighbours that differ by a constant step forwards alone become one loop, outside of those they have.

    The first ``pieces`` of ``addresses`` (source, target), ``runs`` and ``loops`` ([count, source stride, target
    stride] by depth, outermost first, counts of 1 before the loops that there are) become fewer; gives their number.
    """
    found = 0
    at = 0
    while at < pieces:
        last = at
        far = near = 0
        while last + 1 < pieces and runs[last + 1] == runs[at] and _equal(loops, last + 1, at):
            step_far = addresses[last + 1, 0] - addresses[last, 0]
            step_near = addresses[last + 1, 1] - addresses[last, 1]
            if last == at:
                far, near = step_far, step_near
            if far < 0 or near < 0 or step_far != far or step_near != near:
                break
            last += 1
        if found < at:
            addresses[found], runs[found], loops[found] = addresses[at], runs[at], loops[at]
        if last > at:
            depth = loops.shape[2] - 1
            while loops[found, 0, depth] > 1:
                depth -= 1
            loops[found, 0, depth], loops[found, 1, depth], loops[found, 2, depth] = last - at + 1, far, near
        found += 1
        at = last + 1
    return found


@compiled
def _pieces(sources: Array, order: Array, target: int, addresses: Array, runs: Array, loops: Array) -> int:
    """Fills ``addresses`` (source, target), ``runs`` and ``loops`` of the pieces that bytes become; their number."""
    for i in range(order.size):
        addresses[i, 0], addresses[i, 1] = sources[order[i]], order[i] + target
    pieces = _joined(addresses, runs)
    loops[:pieces, 0], loops[:pieces, 1:] = 1, 0
    for _ in range(loops.shape[2]):
        pieces = _looped(addresses, runs, loops, pieces)
    return pieces
