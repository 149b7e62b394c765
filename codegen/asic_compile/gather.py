"""Bytes that come from anywhere, as strided transfers: moves, layout changes, operands that are broadcast."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.isa import Loops
from codegen.asic_compile.transfers import Transfer

Array = NDArray[np.int64]


def gather(sources: Array, target: int) -> list[Transfer]:
    """Transfers that bring the bytes at the DRAM addresses ``sources``, in their order, to ``target`` and on.

    In the order of the sources, so that bytes that lie beside each other in DRAM move as one piece wherever they go;
    or in that of the targets, where it takes no more pieces. Runs of bytes first; then equal runs at equal distances
    become loops, up to three deep.
    """
    ordered = np.argsort(sources, kind="stable")
    if np.count_nonzero(np.diff(sources) != 1) <= np.count_nonzero(np.diff(sources[ordered]) != 1):
        ordered = np.arange(len(sources))
    from_, to = sources[ordered], ordered + target
    breaks = np.flatnonzero((np.diff(from_) != 1) | (np.diff(to) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    runs = np.diff(np.concatenate((starts, [len(sources)])))
    from_, to, shape = from_[starts], to[starts], runs
    shapes: dict[int, tuple[int, tuple[tuple[int, int, int], ...]]] = {
        int(run): (int(run), ()) for run in set(runs.tolist())
    }
    for _ in range(3):
        from_, to, shape, shapes = _looped(from_, to, shape, shapes)
    found = []
    for source, place, kind in zip(from_.tolist(), to.tolist(), shape.tolist(), strict=True):
        run, dims = shapes[kind]
        counts, far, near = zip(*((1, 0, 0),) * (3 - len(dims)), *dims, strict=True)
        found.append(Transfer(source, place, Loops(run, counts, far, near)))
    return found


Shapes = dict[int, tuple[int, tuple[tuple[int, int, int], ...]]]
"""By number: a run, and the loops over it as (count, source stride, target stride), outermost first."""


def _looped(from_: Array, to: Array, shape: Array, shapes: Shapes) -> tuple[Array, Array, Array, Shapes]:
    """Neighbours of one shape that differ by a constant step become one loop around the first."""
    count = len(from_)
    far, near = np.diff(from_), np.diff(to)
    alike = (np.diff(shape) == 0) & (far >= 0) & (near >= 0)
    goes_on = np.zeros(count, np.bool_)  # step i is as step i - 1
    goes_on[1 : count - 1] = alike[1:] & alike[:-1] & (np.diff(far) == 0) & (np.diff(near) == 0)
    ends = np.flatnonzero(~goes_on)
    numbers: dict[tuple[int, tuple[tuple[int, int, int], ...]], int] = {}
    firsts: list[int] = []
    kinds: list[int] = []
    at = 0
    while at < count:
        run, dims = shapes[int(shape[at])]
        last = at
        if at < count - 1 and alike[at]:
            last = int(ends[np.searchsorted(ends, at + 1)])
            dims = ((last - at + 1, int(far[at]), int(near[at])), *dims)
        firsts.append(at)
        kinds.append(numbers.setdefault((run, dims), len(numbers)))
        at = last + 1
    chosen = np.array(firsts, np.int64)
    return from_[chosen], to[chosen], np.array(kinds, np.int64), {number: kind for kind, number in numbers.items()}
