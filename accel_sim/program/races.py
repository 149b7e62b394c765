"""Buffers that two instructions use at the same time, one of them writing, because no token stands between them.

What is refused here is wrong whatever the timing: neither instruction has certainly ended when the other begins. The
engine's check is another one: it knows the times, and sees what bytes really change.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.program.accesses import INDEX, MEMORY, MEMORY_NAMES, WRITE, Accesses, common_byte
from accel_sim.program.code_order import Code
from accel_sim.program.errors import ProgramError
from accel_sim.program.token_run import LANES, LOADS, PRODUCTS, STORES, lanes_of

Ints = NDArray[np.int64]

_MOST_WORK = 1 << 28
"""Steps of all comparisons together; what a program has beyond them is left to the engine."""


def check_races(code: Code, ended: Ints, accesses: Accesses) -> None:
    """Raises :class:`ProgramError` for a write that meets another access of the same bytes.

    ``ended`` as :func:`accel_sim.program.token_run.run_tokens` gives it. Two stores into DRAM, two loads, two
    products never meet: they follow each other. Nor does a load meet a store into DRAM that was asked for no later,
    which is known if the store waited for no product that the load has not waited for: the channel serves it first.
    Whether strided transfers have a byte in common is computed exactly, unless that takes more than a million steps;
    such pairs, and what goes beyond 2^28 steps in all, are the engine's.
    """
    table, begins = accesses.table(len(code))
    lanes = lanes_of(code)
    members = [np.flatnonzero(lanes == lane) for lane in range(LANES)]
    found = np.zeros(4, np.int64)
    work = np.zeros(1, np.int64)
    for first in range(LANES):
        for second in range(first + 1, LANES):
            if _find(members[first], members[second], first, second, ended, table, begins, work, found):
                raise _race(found)


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
    work: Ints,
    found: Ints,
) -> bool:
    """Compares what may overlap in time in two lanes; fills ``found`` with the first race, if there is one."""
    for at in range(first.size):
        a = first[at]
        other = ended[a, second_lane]
        while other < second.size and ended[second[other], first_lane] <= at:
            b = second[other]
            other += 1
            work[0] += 1
            if first_lane == LOADS and second_lane == STORES and ended[b, PRODUCTS] <= ended[a, PRODUCTS]:
                continue
            for i in range(begins[a], begins[a + 1]):
                for j in range(begins[b], begins[b + 1]):
                    work[0] += 1
                    one, two = table[i], table[j]
                    if one[MEMORY] != two[MEMORY] or one[WRITE] + two[WRITE] == 0:
                        continue
                    byte = common_byte(one, two, work)
                    if byte >= 0:
                        found[0], found[1], found[2], found[3] = one[INDEX], two[INDEX], one[MEMORY], byte
                        return True
            if work[0] > _MOST_WORK:
                return False
    return False
