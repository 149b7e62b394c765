"""Runs the three queues on nothing but tokens: who waits for ever, what is left over, and what is known to have ended.

Each kind of token has one queue that posts it and one that waits for it, first in first out. So the n-th that is
waited for is the n-th that was posted, whatever the timing; whether the queues come to an end, and which instructions
have ended before another begins, depends on the program alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.program.code_order import BARRIER, Code, token_names
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Queue

Ints = NDArray[np.int64]

LOADS, PRODUCTS, STORES, STORES_ON_CHIP = 0, 1, 2, 3
"""Lanes: loads, the execute queue, stores into DRAM, stores into the scratchpad. Each ends in order."""

LANES = 4

_ENDED, _DEADLOCK, _LEFT_OVER = 0, 1, 2
_KINDS = 4


def lanes_of(code: Code) -> Ints:
    """The lane of each instruction; -1 for those on which all queues meet."""
    return np.where(code.queue == BARRIER, -1, np.where(code.local, STORES_ON_CHIP, code.queue))


def run_tokens(code: Code) -> Ints:
    """For each instruction, how many of each lane have certainly ended when it begins: (instructions, LANES).

    Raises :class:`ProgramError` where queues wait for ever, and for tokens left over at a barrier.
    """
    lanes = lanes_of(code)
    queues = [np.flatnonzero((code.queue == queue) | (code.queue == BARRIER)) for queue in Queue]
    most = max(int(((code.post >> kind) & 1).sum()) for kind in range(_KINDS))
    ended = np.zeros((len(code), LANES), np.int64)
    carried = np.zeros((_KINDS, most, LANES), np.int64)
    place = np.zeros(len(Queue), np.int64)
    tokens = np.zeros(_KINDS, np.int64)
    barrier = np.zeros(1, np.int64)
    loads, executes, stores = queues
    result = _run(
        loads, executes, stores, code.queue, lanes, code.wait, code.post, ended, carried, place, tokens, barrier
    )
    if result == _DEADLOCK:
        raise _deadlock(code, queues, place, tokens)
    if result == _LEFT_OVER:
        left = ", ".join(f"{count} {token_names(1 << kind)}" for kind, count in enumerate(tokens.tolist()) if count)
        raise ProgramError(
            f"tokens are left over where all queues meet: {left}; expected none", "code", int(barrier[0])
        )
    return ended


@compiled
def _run(
    loads: Ints,
    executes: Ints,
    stores: Ints,
    queue_of: Ints,
    lane_of: Ints,
    wait: Ints,
    post: Ints,
    ended: Ints,
    carried: NDArray[np.int64],
    place: Ints,
    tokens: Ints,
    barrier: Ints,
) -> int:
    """Fills ``ended``; ``place`` is how far each queue came, ``tokens`` how many of each kind wait to be taken."""
    queues = (loads, executes, stores)
    known = np.zeros((3, LANES), np.int64)  # what has ended, as far as each queue has been told
    begun = np.zeros(LANES, np.int64)
    posted = np.zeros(_KINDS, np.int64)
    taken = np.zeros(_KINDS, np.int64)
    while True:
        moved = False
        at_barrier = 0
        for queue in range(3):
            code = queues[queue]
            while place[queue] < code.size:
                index = code[place[queue]]
                if queue_of[index] == BARRIER:
                    at_barrier += 1
                    break
                ready = True
                for kind in range(_KINDS):
                    if (wait[index] >> kind) & 1 and taken[kind] >= posted[kind]:
                        ready = False
                if not ready:
                    break
                for kind in range(_KINDS):
                    if (wait[index] >> kind) & 1:
                        for lane in range(LANES):
                            known[queue, lane] = max(known[queue, lane], carried[kind, taken[kind], lane])
                        taken[kind] += 1
                ended[index] = known[queue]
                lane = lane_of[index]
                begun[lane] += 1
                if queue == PRODUCTS:  # carries out one thing at a time
                    known[queue, lane] = begun[lane]
                for kind in range(_KINDS):
                    if (post[index] >> kind) & 1:
                        carried[kind, posted[kind]] = known[queue]
                        carried[kind, posted[kind], lane] = begun[lane]
                        posted[kind] += 1
                place[queue] += 1
                moved = True
        if at_barrier == 3:
            index = loads[place[0]]
            barrier[0] = index
            for kind in range(_KINDS):
                tokens[kind] = posted[kind] - taken[kind]
            if tokens.any():
                return _LEFT_OVER
            for queue in range(3):
                known[queue] = begun
                place[queue] += 1
            ended[index] = begun
            if place[0] == loads.size:
                return _ENDED
        elif not moved:
            for kind in range(_KINDS):
                tokens[kind] = posted[kind] - taken[kind]
            return _DEADLOCK


def _deadlock(code: Code, queues: list[Ints], place: Ints, tokens: Ints) -> ProgramError:
    """What each queue that hangs waits for; the index is that of the first such instruction."""
    hanging = []
    for queue, indices in zip(Queue, queues, strict=True):
        index = int(indices[place[queue]])
        missing = sum(1 << kind for kind in range(_KINDS) if (code.wait[index] >> kind) & 1 and tokens[kind] == 0)
        if missing:
            hanging.append((index, f"the {queue.name.lower()} queue at instruction {index} for {token_names(missing)}"))
    hanging.sort()
    return ProgramError("waits for ever: " + ", ".join(text for _, text in hanging), "code", hanging[0][0])
