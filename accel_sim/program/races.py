"""Buffers that two instructions use at the same time, one of them writing, because no token stands between them.

What is refused here is wrong whatever the timing: neither instruction has certainly ended when the other begins. The
engine's check is another one: it knows the times, and sees what bytes really change.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.program.accesses import HIGH, INDEX, LOW, MEMORY, MEMORY_NAMES, WRITE, Accesses, common_byte
from accel_sim.program.code_order import Code
from accel_sim.program.errors import ProgramError
from accel_sim.program.token_run import LANES, lanes_of

Ints = NDArray[np.int64]

_MOST_PAIRS = 1 << 28
"""Pairs of accesses that are compared; a program with more that may meet is left to the engine."""


def check_races(code: Code, ended: Ints, accesses: Accesses) -> None:
    """Raises :class:`ProgramError` for a write that meets another access of the same bytes.

    ``ended`` as :func:`accel_sim.program.token_run.run_tokens` gives it. Two stores into DRAM, two loads, two
    products never meet: they follow each other. Whether strided transfers have a byte in common is computed exactly,
    unless they consist of more than a million runs; those, and what goes beyond 2^28 pairs, are left to the engine.
    """
    table, begins = accesses.table(len(code))
    lanes = lanes_of(code)
    members = [np.flatnonzero(lanes == lane) for lane in range(LANES)]
    found = np.zeros(4, np.int64)
    pairs = 0
    for first in range(LANES):
        for second in range(first + 1, LANES):
            pairs = _find(members[first], members[second], first, second, ended, table, begins, pairs, found)
            if pairs < 0:
                raise _race(found)
            if pairs > _MOST_PAIRS:
                return


def _race(found: Ints) -> ProgramError:
    a, b, memory, byte = found.tolist()
    early, late = min(a, b), max(a, b)
    return ProgramError(
        f"uses byte {byte} of the {MEMORY_NAMES[memory]} at the same time as instruction {early}, and one of them "
        "writes it; expected a token between them",
        *("code", late),
    )


@compiled
def _find(
    first: Ints,
    second: Ints,
    first_lane: int,
    second_lane: int,
    ended: Ints,
    table: Ints,
    begins: Ints,
    pairs: int,
    found: Ints,
) -> int:
    """Compares what may overlap in time in two lanes; -1 with ``found`` filled, or the pairs so far."""
    for at in range(first.size):
        a = first[at]
        other = ended[a, second_lane]
        while other < second.size and ended[second[other], first_lane] <= at:
            b = second[other]
            for i in range(begins[a], begins[a + 1]):
                for j in range(begins[b], begins[b + 1]):
                    pairs += 1
                    one, two = table[i], table[j]
                    if one[MEMORY] != two[MEMORY] or one[WRITE] + two[WRITE] == 0:
                        continue
                    if one[HIGH] <= two[LOW] or two[HIGH] <= one[LOW]:
                        continue
                    byte = common_byte(one, two)
                    if byte >= 0:
                        found[0], found[1], found[2], found[3] = one[INDEX], two[INDEX], one[MEMORY], byte
                        return -1
            if pairs > _MOST_PAIRS:
                return pairs
            other += 1
    return pairs
