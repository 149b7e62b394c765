"""The event model against a machine that is stepped cycle by cycle, with queues and an arbiter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.pricing.pipeline import pipeline_cycles


@dataclass(order=True)
class Transfer:
    asked: int
    is_load: bool  # a store asked for in the same cycle goes first
    step: int
    cycles: int = field(compare=False)


def step_by_step(
    load: list[int],
    compute: list[int],
    store: list[int],
    buffers: int,
    latency: int,
    pipelined: bool,
    on_channel: bool,
    log: list[tuple[Transfer, int, int]] | None = None,
) -> int:
    """The rules of the module's docstring, one cycle after another; nothing here knows a recurrence.

    ``log`` takes each transfer, the cycle in which its first byte comes, and the one in which its last byte has come.
    """
    steps = len(load)
    tile_of, tile = [], 0
    for s in range(steps):
        tile_of.append(tile)
        tile += store[s] > 0
    loaded = {s for s in range(steps) if load[s] == 0}
    computed: set[int] = set()
    emptied: set[int] = set()
    queue: list[Transfer] = []
    arriving: list[tuple[int, Transfer]] = []  # (cycle in which it has arrived, transfer)
    draining: list[tuple[int, int]] = []  # the scratchpad's own way: (cycle, step), in order
    asked: set[int] = set()
    channel_free = array_free = 0
    running: int | None = None
    next_step, now = 0, 0
    while True:
        if running is not None and array_free == now:
            computed.add(running)
            if store[running]:
                if on_channel:
                    queue.append(Transfer(now, False, running, store[running]))
                else:
                    begin = max([now, *(end for end, _ in draining)])
                    draining.append((begin + store[running], running))
            running = None
        for s in range(steps):
            if s not in asked and load[s] and (s < buffers or s - buffers in computed):
                queue.append(Transfer(now, True, s, load[s]))
                asked.add(s)
        for at, transfer in arriving:
            if at == now:
                (loaded if transfer.is_load else emptied).add(
                    transfer.step if transfer.is_load else tile_of[transfer.step]
                )
        emptied |= {tile_of[s] for at, s in draining if at == now}
        if queue and channel_free <= now:
            queue.sort()
            transfer = queue.pop(0)
            end = now + latency + transfer.cycles
            arriving.append((end, transfer))
            if log is not None:
                log.append((transfer, now + latency, end))
            channel_free = now + transfer.cycles if pipelined else end
            continue  # a transfer of no length at all does not exist, so this ends
        if running is None and next_step < steps and next_step in loaded:
            begins = next_step == 0 or store[next_step - 1] > 0
            o = tile_of[next_step]
            if not begins or o < buffers or o - buffers in emptied:
                running, array_free = next_step, now + compute[next_step]
                next_step += 1
        pending = [at for at, _ in arriving if at > now] + [at for at, _ in draining if at > now]
        if next_step == steps and running is None and not queue and not pending:
            return now
        now += 1


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int, int, bool, bool]:
    steps = draw(st.integers(1, 14))
    small = st.integers(0, 12)
    load = [draw(small) for _ in range(steps)]
    compute = [draw(st.integers(1, 12)) for _ in range(steps)]
    store = [draw(st.sampled_from([0, 0, 1, 5, 11])) for _ in range(steps - 1)] + [draw(st.integers(1, 9))]
    load[0] = max(load[0], 1)
    return (
        load,
        compute,
        store,
        draw(st.integers(1, 3)),
        draw(st.integers(0, 7)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def fast(program: tuple[list[int], list[int], list[int], int, int, bool, bool]) -> int:
    load, compute, store, buffers, latency, pipelined, on_channel = program
    arrays = (np.array(part, np.int64) for part in (load, compute, store))
    return pipeline_cycles(*arrays, len(load), buffers, latency, int(pipelined), int(on_channel))


@settings(max_examples=400, deadline=None)
@given(programs())
def test_equals_the_stepped_machine(program: tuple[list[int], list[int], list[int], int, int, bool, bool]) -> None:
    assert fast(program) == step_by_step(*program)


@settings(max_examples=200, deadline=None)
@given(programs(), st.data())
def test_nothing_shorter_makes_it_later(
    program: tuple[list[int], list[int], list[int], int, int, bool, bool], data: st.DataObject
) -> None:
    load, compute, store, buffers, latency, pipelined, on_channel = program
    before = fast(program)
    shorter = (
        [data.draw(st.integers(0, cycles)) for cycles in load],
        [data.draw(st.integers(1, cycles)) for cycles in compute],
        [data.draw(st.integers(1, cycles)) if cycles else 0 for cycles in store],
        *(buffers, data.draw(st.integers(0, latency)), pipelined, on_channel),
    )
    assert fast(shorter) <= before
    assert fast((load, compute, store, buffers + 1, latency, pipelined, on_channel)) <= before
    assert fast((load, compute, store, buffers, latency, True, on_channel)) <= before


@settings(max_examples=200, deadline=None)
@given(programs())
def test_a_tile_s_accumulators_are_free_when_its_first_load_comes(
    program: tuple[list[int], list[int], list[int], int, int, bool, bool],
) -> None:
    """So a residual may come with that load, straight into the accumulators, without any room of its own."""
    load, compute, store, buffers, latency, pipelined, _ = program
    log: list[tuple[Transfer, int, int]] = []
    step_by_step(load, compute, store, buffers, latency, pipelined, True, log)
    ends = [s for s, cycles in enumerate(store) if cycles]
    begins = [0, *(s + 1 for s in ends[:-1])]
    loads = {t.step: first for t, first, _ in log if t.is_load}
    stores = {t.step: last for t, _, last in log if not t.is_load}
    for tile, begin in enumerate(begins):
        if tile >= buffers and begin in loads:
            assert loads[begin] >= stores[ends[tile - buffers]]


def test_a_schedule_by_hand() -> None:
    """Two buffers, latency 2. L0 0-6, L1 6-12, C0 6-16, S0 16-21 (before L2, asked for at the same time), L2 21-27,
    C1 16-26, S1 27-32, C2 27-37 (its accumulators are free since 21), S2 37-42.
    """
    load, compute, store = (np.full(3, cycles, np.int64) for cycles in (4, 10, 3))
    assert pipeline_cycles(load, compute, store, 3, 2, 2, 0, 1) == 42


def test_single_buffers_do_not_overlap() -> None:
    """One buffer: load, compute, store in turn; only a store and the next load share nothing but the channel."""
    load, compute, store = (np.full(3, cycles, np.int64) for cycles in (4, 10, 3))
    assert pipeline_cycles(load, compute, store, 3, 1, 0, 0, 1) == 3 * (4 + 10 + 3)
