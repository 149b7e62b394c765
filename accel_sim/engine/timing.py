"""When everything happens: three queues, the tokens between them, and the one channel, in integer cycles.

- A queue begins its items in order, each when its tokens are there. A request of the load or store queue is asked for
  then; that it waits for the channel does not hold back the next one.
- The channel serves the oldest request first, a store before a load asked for in the same cycle. Service starts when
  the channel is free and lasts the latency and the data; the channel is free again when the data have passed, or, on a
  machine that pipelines requests, one latency earlier: then the next request's latency overlaps the present data.
- Stores into the scratchpad follow each other on a way of their own. A request that moves nothing takes no time.
- The items of a queue end in order: what is there before an earlier item of its queue has to wait for it.
- At a barrier all ends; what follows begins at that time.

No request that is not known yet can be older than the oldest known one: what releases it waits for one that has not
been served. So the oldest known request is served next, and the whole is one pass over the program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.columnar import Columns, decode
from accel_sim.engine.errors import DeadlockError
from accel_sim.jit import compiled
from accel_sim.program.isa import Program, Queue, Token
from accel_sim.spec import MachineSpec

LOADED, FREED, COMPUTED, STORED = 0, 1, 2, 3


@dataclass(frozen=True)
class Schedule:
    """When each item began and ended; indices as in :class:`accel_sim.engine.columnar.Items`.

    ``requested``, ``started``, ``ended`` hold one array per queue, one entry per item. A request of the channel is
    asked for at ``requested`` and served from ``started`` on: first the latency, then its data. ``order`` is the place
    of an item among all, in an order that is one of cause and effect. ``barriers``: when each barrier was reached;
    ``cycles``: the last of them. ``tokens``: when the tokens of each kind were posted, (4, most).
    """

    columns: Columns
    requested: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    started: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    ended: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    order: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    barriers: NDArray[np.int64]
    latency_cycles: int
    tokens: NDArray[np.int64]

    @property
    def cycles(self) -> int:
        return int(self.barriers[-1])


@compiled
def _tokens_at(waits: NDArray[np.int64], item: int, first: int, second: int, tokens: NDArray[np.int64]) -> int:
    """When the tokens that an item waits for are there; -1: not known yet."""
    at = 0
    for kind in (first, second):
        token = waits[kind, item]
        if token >= 0:
            if token >= tokens.shape[1] or tokens[kind, token] < 0:
                return -1
            at = max(at, tokens[kind, token])
    return at


@compiled
def _post(posts: NDArray[np.int64], item: int, at: int, tokens: NDArray[np.int64]) -> None:
    for kind in range(4):
        if posts[kind, item] >= 0:
            tokens[kind, posts[kind, item]] = at


@compiled
def _run(
    segments: int,
    load: Any,
    execute: Any,
    store: Any,
    latency: int,
    pipelined: int,
    tokens: NDArray[np.int64],
    load_times: NDArray[np.int64],
    execute_times: NDArray[np.int64],
    store_times: NDArray[np.int64],
    barriers: NDArray[np.int64],
    at: NDArray[np.int64],
) -> int:
    """Fills the times (request, start, end, order) and ``barriers``; gives the segment that never ends, or -1.

    ``load``, ``execute``, ``store``: (segment, cycles, local, waits, posts). ``at`` tells how far the queues came.
    """
    load_segment, load_cycles, _, load_waits, load_posts = load
    execute_segment, execute_cycles, _, execute_waits, execute_posts = execute
    store_segment, store_cycles, store_local, store_waits, store_posts = store
    now = 0
    order = 0
    asked_load = asked_store = at_load = at_execute = at_store = 0
    for segment in range(segments):
        channel_free = array_free = local_free = now
        load_asked = store_asked = load_ended = store_ended = now
        while True:
            moved = True
            while moved:
                moved = False
                while at_execute < execute_segment.size and execute_segment[at_execute] == segment:
                    ready = _tokens_at(execute_waits, at_execute, LOADED, STORED, tokens)
                    if ready < 0:
                        break
                    start = max(array_free, ready)
                    array_free = start + execute_cycles[at_execute]
                    execute_times[0, at_execute] = execute_times[1, at_execute] = start
                    execute_times[2, at_execute] = array_free
                    execute_times[3, at_execute] = order
                    _post(execute_posts, at_execute, array_free, tokens)
                    order += 1
                    at_execute += 1
                    moved = True
                while asked_load < load_segment.size and load_segment[asked_load] == segment:
                    ready = _tokens_at(load_waits, asked_load, FREED, FREED, tokens)
                    if ready < 0:
                        break
                    load_asked = max(load_asked, ready)
                    load_times[0, asked_load] = load_asked
                    asked_load += 1
                    moved = True
                while at_load < asked_load and load_cycles[at_load] == 0:
                    load_ended = max(load_ended, load_times[0, at_load])
                    load_times[1, at_load] = load_times[2, at_load] = load_ended
                    load_times[3, at_load] = order
                    _post(load_posts, at_load, load_ended, tokens)
                    order += 1
                    at_load += 1
                    moved = True
                while asked_store < store_segment.size and store_segment[asked_store] == segment:
                    ready = _tokens_at(store_waits, asked_store, COMPUTED, COMPUTED, tokens)
                    if ready < 0:
                        break
                    store_asked = max(store_asked, ready)
                    store_times[0, asked_store] = store_asked
                    if store_local[asked_store]:
                        start = max(local_free, store_asked)
                        local_free = start + store_cycles[asked_store]
                        store_times[1, asked_store] = start
                        store_times[2, asked_store] = local_free
                    asked_store += 1
                    moved = True
                while at_store < asked_store and (store_local[at_store] or store_cycles[at_store] == 0):
                    if store_local[at_store]:
                        store_ended = max(store_ended, store_times[2, at_store])
                    else:
                        store_ended = max(store_ended, store_times[0, at_store])
                        store_times[1, at_store] = store_ended
                    store_times[2, at_store] = store_ended
                    store_times[3, at_store] = order
                    _post(store_posts, at_store, store_ended, tokens)
                    order += 1
                    at_store += 1
                    moved = True
            if at_load == asked_load and at_store == asked_store:
                break
            if at_store < asked_store and (at_load == asked_load or store_times[0, at_store] <= load_times[0, at_load]):
                start = max(channel_free, store_times[0, at_store])
                served = start + latency + store_cycles[at_store]
                store_ended = max(store_ended, served)
                channel_free = start + store_cycles[at_store] if pipelined else served
                store_times[1, at_store] = start
                store_times[2, at_store] = store_ended
                store_times[3, at_store] = order
                _post(store_posts, at_store, store_ended, tokens)
                at_store += 1
            else:
                start = max(channel_free, load_times[0, at_load])
                served = load_ended = start + latency + load_cycles[at_load]
                channel_free = start + load_cycles[at_load] if pipelined else served
                load_times[1, at_load] = start
                load_times[2, at_load] = served
                load_times[3, at_load] = order
                _post(load_posts, at_load, served, tokens)
                at_load += 1
            order += 1
        at[0], at[1], at[2] = asked_load, at_execute, asked_store
        if (
            (asked_load < load_segment.size and load_segment[asked_load] == segment)
            or (at_execute < execute_segment.size and execute_segment[at_execute] == segment)
            or (asked_store < store_segment.size and store_segment[asked_store] == segment)
        ):
            return segment
        now = max(array_free, max(load_ended, store_ended))
        barriers[segment] = now
    return -1


def schedule(program: Program, spec: MachineSpec, columns: Columns | None = None) -> Schedule:
    """When everything in ``program`` happens on ``spec``. DeadlockError where a queue waits for ever."""
    columns = decode(program, spec) if columns is None else columns
    most = max((int(part.posts.max(initial=-1)) for part in columns.items), default=-1) + 1
    tokens = np.full((4, most), -1, np.int64)
    times = [np.zeros((4, len(part)), np.int64) for part in columns.items]
    barriers = np.zeros(len(columns.barriers), np.int64)
    at = np.zeros(3, np.int64)
    load, execute, store = ((part.segment, part.cycles, part.local, part.waits, part.posts) for part in columns.items)
    stuck = _run(
        len(barriers),
        load,
        execute,
        store,
        spec.dram.latency_cycles,
        int(spec.dram.pipelined_requests),
        tokens,
        times[0],
        times[1],
        times[2],
        barriers,
        at,
    )
    if stuck >= 0:
        raise _deadlock(columns, stuck, at, tokens)
    requested, started, ended, order = ((times[0][row], times[1][row], times[2][row]) for row in range(4))
    return Schedule(columns, requested, started, ended, order, barriers, spec.dram.latency_cycles, tokens)


def _deadlock(columns: Columns, segment: int, at: NDArray[np.int64], tokens: NDArray[np.int64]) -> DeadlockError:
    """Names what each queue that did not end waits for."""
    waiting = []
    for queue, part in zip(Queue, columns.items, strict=True):
        item = int(at[queue])
        if item < len(part) and part.segment[item] == segment:
            missing = [
                str(Token(1 << kind).name)
                for kind in range(4)
                if (token := part.waits[kind, item]) >= 0 and (token >= tokens.shape[1] or tokens[kind, token] < 0)
            ]
            waiting.append((int(part.first[item]), queue.name.lower(), " and ".join(missing)))
    waiting.sort()
    said = "; ".join(f"{queue} at {index} waits for {kinds}" for index, queue, kinds in waiting)
    return DeadlockError(f"deadlock: {said}", "code", waiting[0][0])
