"""Which instructions touch memory at the same time, and whether one changes what another uses.

The array, the channel and the way into the scratchpad each carry out one thing after the other, so only instructions
on different ones can overlap. A transfer counts from its request to its end: it was released, so whatever it touches
must be left alone from then on, whether its data move yet or not. A product counts from its preload on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.effects import Effect
from accel_sim.engine.errors import HazardError
from accel_sim.engine.scratchpad import Box
from accel_sim.engine.timing import Schedule
from accel_sim.program.isa import Queue


@dataclass(frozen=True)
class Happenings:
    """All items, in the order in which they take effect: at their ends.

    ``queue`` and ``item`` say which, ``way`` what carries it out: 0 the array, 1 the channel, 2 the way into the
    scratchpad, 3 nothing. ``overlaps``: for each way, ranges of places in this order on the other ways that overlap
    an item in time, as (the other way's places, first, last + 1).
    """

    queue: NDArray[np.int64]
    item: NDArray[np.int64]
    segment: NDArray[np.int64]
    overlaps: list[tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], ...]]
    way: NDArray[np.int64]

    def beside(self, place: int) -> list[int]:
        """Places of what overlaps the item at ``place`` in time."""
        found: list[int] = []
        for places, first, last in self.overlaps[self.way[place]]:
            found.extend(places[first[place] : last[place]].tolist())
        return found


def happenings(times: Schedule) -> Happenings:
    """The order in which a schedule's items take effect, and which overlap."""
    items = times.columns.items
    queue = np.concatenate([np.full(len(part), at) for at, part in enumerate(items)])
    item = np.concatenate([np.arange(len(part)) for part in items])
    segment = np.concatenate([part.segment for part in items])
    cycles = np.concatenate([part.cycles for part in items])
    local = np.concatenate([part.local for part in items])
    begin = np.concatenate(times.requested)
    end = np.concatenate(times.started) + cycles
    end += np.where((queue != Queue.EXECUTE) & ~local & (cycles > 0), times.latency_cycles, 0)
    if len(items[Queue.EXECUTE]):
        preloads = times.columns.preloads[items[Queue.EXECUTE].first[:-1]]
        own = begin[queue == Queue.EXECUTE]
        own[1:][preloads] = times.started[Queue.EXECUTE][:-1][preloads]
        begin[queue == Queue.EXECUTE] = own
    place = np.lexsort((np.concatenate(times.order), end, segment))
    queue, item, segment, begin, end, local = (part[place] for part in (queue, item, segment, begin, end, local))
    way = np.where(queue == Queue.EXECUTE, 0, np.where(local, 2, 1))
    way[(queue != Queue.EXECUTE) & (begin == end)] = 3  # moves nothing
    on_way = [np.flatnonzero(way == at) for at in range(3)]
    ranges = []
    for places in on_way:
        first = np.searchsorted(end[places], begin, side="right")
        last = np.searchsorted(begin[places], end, side="left")
        ranges.append((places, first, np.maximum(first, last)))
    overlaps = [tuple(ranges[other] for other in range(3) if other != at) for at in range(4)]
    return Happenings(queue, item, segment, overlaps, way)


def check_change(effect: Effect, values: NDArray[np.uint8], others: list[Effect]) -> None:
    """HazardError where writing ``values`` changes a byte that one of ``others`` reads or writes."""
    low, high = effect.write.span
    changed: NDArray[np.bool_] | None = None
    for other in others:
        for box in (other.write, *other.reads):
            if box.memory is not effect.write.memory:
                continue
            from_, to = box.span
            if from_ >= high or to <= low or low == high or from_ == to:
                continue
            if changed is None:
                touched = (effect.write.values() != values).any(axis=0)
                changed = np.zeros(high - low, np.bool_)
                Box(effect.write.memory, effect.write.start - low, effect.write.shape, effect.write.strides).mark(
                    changed, touched
                )
            used = np.zeros(box.memory.size, np.bool_)
            box.mark(used, True if box.used is None else box.used)
            both = np.flatnonzero(changed & used[low:high])
            if len(both):
                verb = "writes" if box is other.write else "reads"
                raise HazardError(
                    f"changes what instruction {other.index} {verb} at the same time",
                    *(effect.index, other.index, box.memory.name, low + int(both[0])),
                )
