"""Which bytes each instruction reads and writes, as strided sets, in columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled

DRAM, SCRATCHPAD, ACCUMULATOR = 0, 1, 2
"""Memories. The on-chip ones are those of :class:`accel_sim.program.isa.Space`, plus one."""

MEMORY_NAMES = ("DRAM", "scratchpad", "accumulator memory")

INDEX, MEMORY, WRITE, LOW, HIGH, BASE, RUN, COUNT, STRIDE = 0, 1, 2, 3, 4, 5, 6, 7, 10
"""Columns of an access: counts and strides are three each, outermost first; low and high bound it."""

WIDTH = 13

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
        """Accesses of instructions ``index``: ``counts`` and ``strides`` (in bytes) are (accesses, 3)."""
        part = np.zeros((len(index), WIDTH), np.int64)
        part[:, INDEX], part[:, MEMORY], part[:, WRITE] = index, memory, int(write)
        part[:, BASE], part[:, RUN] = base, run
        part[:, COUNT : COUNT + 3] = 1 if counts is None else counts
        if strides is not None:
            part[:, STRIDE : STRIDE + 3] = strides
        reach = (part[:, COUNT : COUNT + 3] - 1) * part[:, STRIDE : STRIDE + 3]
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
def common_byte(a: Ints, b: Ints, work: Ints) -> int:
    """A byte that two accesses to one memory have in common; -1 if there is none, or :data:`UNDECIDED`.

    Exact, not of the bounds alone: takes the runs of the one that has fewer, and looks for each in the other. Adds the
    steps that it took to ``work[0]``.
    """
    if a[HIGH] <= b[LOW] or b[HIGH] <= a[LOW]:
        return -1
    if a[COUNT] * a[COUNT + 1] * a[COUNT + 2] > b[COUNT] * b[COUNT + 1] * b[COUNT + 2]:
        a, b = b, a
    # The innermost loop of b is solved, not run: let it be the one with the highest count.
    solved = 0
    for loop in range(1, 3):
        if b[COUNT + loop] > b[COUNT + solved]:
            solved = loop
    outer, inner = (1 if solved == 0 else 0), (1 if solved == 2 else 2)
    first, second, last = b[COUNT + outer], b[COUNT + inner], b[COUNT + solved]
    stride, start = b[STRIDE + solved], b[BASE]
    if stride < 0:
        start += stride * (last - 1)
        stride = -stride
    most = work[0] + _MOST_STEPS
    for i in range(a[COUNT]):
        for j in range(a[COUNT + 1]):
            for k in range(a[COUNT + 2]):
                low = a[BASE] + i * a[STRIDE] + j * a[STRIDE + 1] + k * a[STRIDE + 2]
                high = low + a[RUN]
                work[0] += 1
                if work[0] > most:
                    return UNDECIDED
                if high <= b[LOW] or low >= b[HIGH]:
                    continue
                for m in range(first):
                    for n in range(second):
                        work[0] += 1
                        if work[0] > most:
                            return UNDECIDED
                        begin = start + m * b[STRIDE + outer] + n * b[STRIDE + inner]
                        # The first run of b that ends behind low; it is common if it begins before high.
                        step = 0
                        if stride > 0 and begin + b[RUN] <= low:
                            step = (low - begin - b[RUN]) // stride + 1
                        if step < last:
                            found = begin + step * stride
                            if found < high and found + b[RUN] > low:
                                return int(max(found, low))
    return -1
