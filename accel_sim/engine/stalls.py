"""What each queue did in every cycle: worked, or waited, and for what. The reasons sum to the cycles exactly."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.timing import LOADED, STORED, Schedule
from accel_sim.jit import compiled
from accel_sim.program.isa import Queue


class Activity(IntEnum):
    """Of the execute queue: BUSY, DATA, ACCUMULATORS, BARRIER. Of the load queue: BUSY, BUFFER, CHANNEL, LATENCY,
    BARRIER. Of the store queue: BUSY, RESULTS, CHANNEL, LATENCY, BARRIER.
    """

    BUSY = 0
    """The array or vector unit computes; data of the queue's requests move."""
    DATA = 1
    """Execute waits for a load (LOADED)."""
    BUFFER = 2
    """Load waits for a buffer that is still read (FREED)."""
    ACCUMULATORS = 3
    """Execute waits for a store (STORED)."""
    RESULTS = 4
    """Store waits for the array (COMPUTED)."""
    CHANNEL = 5
    """A request waits for the channel, which serves another one."""
    LATENCY = 6
    """The queue's oldest request is served, and its first byte has not come."""
    BARRIER = 7
    """The queue has nothing left to do before all meet."""


def queue_activities(times: Schedule) -> NDArray[np.int64]:
    """Cycles of each :class:`Activity` by segment and queue, (segments, 3, len(Activity)); every row sums to the
    segment's cycles.

    Where requests of one queue overlap, the oldest counts. Where an instruction waits for two tokens, the one that
    comes last counts.
    """
    result = np.zeros((len(times.barriers), 3, len(Activity)), np.int64)
    begins = np.concatenate(([0], times.barriers[:-1]))
    for queue in Queue:
        part = times.columns.items[queue]
        if queue == Queue.EXECUTE:
            waits = np.full(len(part), Activity.DATA)
            both = (part.waits[LOADED] >= 0) & (part.waits[STORED] >= 0)
            last = times.tokens[STORED, part.waits[STORED][both]] > times.tokens[LOADED, part.waits[LOADED][both]]
            waits[part.waits[STORED] >= 0] = Activity.ACCUMULATORS
            waits[np.flatnonzero(both)[~last]] = Activity.DATA
            served = times.started[queue]
        else:
            waits = np.full(len(part), Activity.BUFFER if queue == Queue.LOAD else Activity.RESULTS)
            served = times.started[queue] + np.where(~part.local & (part.cycles > 0), times.latency_cycles, 0)
        _account(
            part.segment,
            waits,
            times.requested[queue],
            times.started[queue],
            served,
            served + part.cycles,
            begins,
            times.barriers,
            result[:, queue],
        )
    return result


@compiled
def _account(
    segment: NDArray[np.int64],
    waits: NDArray[np.int64],
    asked: NDArray[np.int64],
    started: NDArray[np.int64],
    served: NDArray[np.int64],
    ended: NDArray[np.int64],
    begins: NDArray[np.int64],
    barriers: NDArray[np.int64],
    result: Any,
) -> None:
    item = 0
    for part in range(barriers.size):
        at = begins[part]
        while item < segment.size and segment[item] == part:
            for until, why in ((asked[item], waits[item]), (started[item], 5), (served[item], 6), (ended[item], 0)):
                if until > at:
                    result[part, why] += until - at
                    at = until
            item += 1
        result[part, 7] += barriers[part] - at
