"""Bytes that come from anywhere, as strided transfers: moves, layout changes, operands that are broadcast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.isa import Loops
from codegen.asic_compile.transfers import Transfer


@dataclass(frozen=True)
class _Box:
    """A run, or loops over it: ``dims`` are (count, source stride, target stride), outermost first."""

    source: int
    target: int
    run: int
    dims: tuple[tuple[int, int, int], ...] = ()


def gather(sources: NDArray[np.int64], target: int) -> list[Transfer]:
    """Transfers that bring the bytes at the DRAM addresses ``sources``, in their order, to ``target`` and on.

    Runs of bytes that follow each other first; then equal runs at equal distances become loops, up to three deep.
    """
    breaks = np.flatnonzero(np.diff(sources) != 1) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(sources)])))
    boxes = [
        _Box(int(sources[at]), int(at), int(length))
        for at, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
    for _ in range(3):
        boxes = _looped(boxes)
    found = []
    for box in boxes:
        dims = [(1, 0, 0)] * (3 - len(box.dims)) + list(box.dims)
        counts, far, near = zip(*dims, strict=True)
        found.append(Transfer(box.source, target + box.target, Loops(box.run, counts, far, near)))
    return found


def _looped(boxes: list[_Box]) -> list[_Box]:
    """Neighbours that differ by a constant step become one loop around the first."""
    found: list[_Box] = []
    at = 0
    while at < len(boxes):
        first = boxes[at]
        count = 1
        step: tuple[int, int] | None = None
        while at + count < len(boxes):
            before, after = boxes[at + count - 1], boxes[at + count]
            distance = after.source - before.source, after.target - before.target
            if (after.run, after.dims) != (first.run, first.dims) or step not in (None, distance):
                break
            step = distance
            count += 1
        if step is None or count < 2:
            found.append(first)
            at += 1
            continue
        found.append(_Box(first.source, first.target, first.run, ((count, *step), *first.dims)))
        at += count
    return found
