"""Which bytes each instruction reads and writes, as strided sets, in columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled

DRAM, SCRATCHPAD, ACCUMULATOR = 0, 1, 2
"""Memories. The on-chip ones are those of :class:`accel_sim.program.isa.Space`, plus one."""

MEMORY_NAMES = ("DRAM", "scratchpad", "accumulator memory")

INDEX, MEMORY, WRITE, LOW, HIGH, BASE, RUN, COUNT = 0, 1, 2, 3, 4, 5, 6, 7
"""Columns of an access; from COUNT on, the counts of its loops, then their strides. Low and high bound it."""

LOOPS = 5
STRIDE = COUNT + LOOPS
WIDTH = STRIDE + LOOPS

Ints = NDArray[np.int64]


@dataclass
class Accesses:
    """Collects accesses; :meth:`table` has them all, by instruction."""

    parts: list[Ints] = field(default_factory=list)

    def add(
        self,
        index: Ints,
        memory: Ints | int,
        write: bool,
        base: Ints,
        run: Ints,
        counts: Ints | None = None,
        strides: Ints | None = None,
    ) -> None:
        """Accesses of instructions ``index``: ``counts`` and ``strides`` (in bytes) are (accesses, up to LOOPS)."""
        part = np.zeros((len(index), WIDTH), np.int64)
        part[:, INDEX], part[:, MEMORY], part[:, WRITE] = index, memory, int(write)
        part[:, BASE], part[:, RUN] = base, run
        part[:, COUNT:STRIDE] = 1
        if counts is not None and strides is not None:
            part[:, COUNT : COUNT + counts.shape[1]] = counts
            part[:, STRIDE : STRIDE + strides.shape[1]] = strides
        reach = (part[:, COUNT:STRIDE] - 1) * part[:, STRIDE:]
        part[:, LOW] = base + np.minimum(reach, 0).sum(axis=1)
        part[:, HIGH] = base + np.maximum(reach, 0).sum(axis=1) + run
        self.parts.append(part)

    def table(self, instructions: int) -> tuple[Ints, Ints]:
        """(accesses, WIDTH) in the order of the instructions, and where those of each begin (instructions + 1,)."""
        found = np.concatenate(self.parts) if self.parts else np.zeros((0, WIDTH), np.int64)
        self.parts = []
        found = found[np.argsort(found[:, INDEX], kind="stable")]
        return found, np.searchsorted(found[:, INDEX], np.arange(instructions + 1))


UNDECIDED = -2
"""Two sets of so many runs that comparing them takes too long."""

_MOST_STEPS = 1 << 20


@compiled
def _runs(access: Ints) -> float:
    runs = 1.0
    for loop in range(LOOPS):
        runs *= access[COUNT + loop]
    return runs


@compiled
def _offset(access: Ints, at: Ints) -> int:
    offset = 0
    for loop in range(LOOPS):
        offset += at[loop] * access[STRIDE + loop]
    return offset


@compiled
def _step(access: Ints, at: Ints, left_out: int) -> bool:
    """Takes the loops but one a step on; False, and all at 0 again, behind the last."""
    for loop in range(LOOPS - 1, -1, -1):
        if loop == left_out:
            continue
        at[loop] += 1
        if at[loop] < access[COUNT + loop]:
            return True
        at[loop] = 0
    return False


@compiled
def common_byte(a: Ints, b: Ints, work: Ints) -> int:
    """A byte that two accesses to one memory have in common; -1 if there is none, or :data:`UNDECIDED`.

    Exact, not of the bounds alone: takes the runs of the one that has fewer, and looks for each in the other. Adds the
    steps that it took to ``work[0]``.
    """
    if a[HIGH] <= b[LOW] or b[HIGH] <= a[LOW]:
        return -1
    if _runs(a) > _runs(b):
        a, b = b, a
    # The longest loop of b is solved, not run.
    solved = 0
    for loop in range(1, LOOPS):
        if b[COUNT + loop] > b[COUNT + solved]:
            solved = loop
    last, stride, start = b[COUNT + solved], b[STRIDE + solved], b[BASE]
    if stride < 0:
        start += stride * (last - 1)
        stride = -stride
    most = work[0] + _MOST_STEPS
    at, inner = np.zeros(LOOPS, np.int64), np.zeros(LOOPS, np.int64)
    more = True
    while more:
        work[0] += 1
        if work[0] > most:
            return UNDECIDED
        low = a[BASE] + _offset(a, at)
        high = low + a[RUN]
        more = _step(a, at, -1)
        if high <= b[LOW] or low >= b[HIGH]:
            continue
        within = True
        while within:
            work[0] += 1
            if work[0] > most:
                return UNDECIDED
            begin = start + _offset(b, inner)
            within = _step(b, inner, solved)
            # The first run of b that ends behind low; it is common if it begins before high.
            step = 0
            if stride > 0 and begin + b[RUN] <= low:
                step = (low - begin - b[RUN]) // stride + 1
            if step < last:
                found = begin + step * stride
                if found < high and found + b[RUN] > low:
                    return int(max(found, low))
    return -1
