"""When things happen: against the price list's event model, and against a machine stepped cycle by cycle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.engine import DeadlockError, run
from accel_sim.engine.timing import schedule
from accel_sim.pricing.pipeline import pipeline_cycles
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Halt, Load, Loops, Store, Sync, Token
from accel_sim.spec import DramSpec
from accel_sim.spec_file import load_spec
from tests.accel_sim.engine.step_programs import compute, machine, program_of, random_code, steps_code
from tests.accel_sim.engine.stepped_machine import Machine


@st.composite
def step_lists(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    steps = draw(st.integers(1, 16))
    load = [draw(st.integers(0, 12)) for _ in range(steps)]
    work = [draw(st.integers(1, 12)) for _ in range(steps)]
    store = [draw(st.sampled_from([0, 0, 1, 5, 11])) for _ in range(steps - 1)] + [draw(st.integers(1, 9))]
    return load, work, store


@settings(max_examples=300, deadline=None)
@given(
    step_lists(), st.integers(1, 3), st.integers(0, 9), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2)
)
def test_tiles_cost_what_the_event_model_says(
    steps: tuple[list[int], list[int], list[int]],
    buffers: int,
    latency: int,
    pipelined: bool,
    on_channel: bool,
    empty_loads: bool,
    layers_before: int,
) -> None:
    """Also where other layers came before: a layer costs what it costs alone."""
    load, work, store = steps
    layer = steps_code(load, work, store, buffers, on_channel, empty_loads)
    code = [Sync(0), *(instruction for _ in range(layers_before + 1) for instruction in (*layer, Sync(0))), Halt()]
    arrays = (np.array(part, np.int64) for part in steps)
    expected = pipeline_cycles(*arrays, len(load), buffers, latency, int(pipelined), int(on_channel))
    spec = machine(latency, pipelined)
    assert run(program_of(code), spec, {}, values=False).cycles == (layers_before + 1) * expected


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 40), st.integers(0, 9), st.booleans(), st.sampled_from([1, 7, 64]))
def test_random_programs_equal_the_stepped_machine(
    seed: int, length: int, latency: int, pipelined: bool, burst: int
) -> None:
    """All of it: when each request was asked for, when it was served, when it ended."""
    spec = replace(load_spec("edge_16x16"), dram=DramSpec(16.0, latency, burst, pipelined))
    program = program_of(random_code(seed, length))
    times = schedule(program, spec)
    stepped = Machine(spec)
    assert times.cycles == stepped.run(program)
    for part, asked, started, ended in zip(
        times.columns.items, times.requested, times.started, times.ended, strict=True
    ):
        for at, first in enumerate(part.first.tolist()):
            work = stepped.log[first]
            assert work.cycles == part.cycles[at]
            assert (work.asked, work.ended) == (asked[at], ended[at])
            if work.cycles:
                assert work.began == started[at]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 40), st.integers(0, 9), st.booleans(), st.floats(0.5, 64), st.data())
def test_more_bandwidth_is_never_slower(
    seed: int, length: int, latency: int, pipelined: bool, bytes_per_cycle: float, data: st.DataObject
) -> None:
    """Tiles in steps, or anything: what releases requests is one queue in order, so theirs never changes.

    Not so where an instruction of no cycles lies between what releases a load and what releases a store.
    """
    if data.draw(st.booleans()):
        load, work, store = data.draw(step_lists())
        code = [Sync(0), *steps_code(load, work, store, data.draw(st.integers(1, 3)), data.draw(st.booleans())), Halt()]
    else:
        code = random_code(seed, length, least_work_cycles=1)
    slow = machine(latency, pipelined, bytes_per_cycle)
    less = data.draw(st.integers(0, latency))
    fast = machine(less, pipelined or data.draw(st.booleans()), bytes_per_cycle * data.draw(st.floats(1, 4)))
    assert schedule(program_of(code), fast).cycles <= schedule(program_of(code), slow).cycles


def test_a_token_counts_in_the_cycle_in_which_it_is_posted_and_no_earlier() -> None:
    """Ten cycles of data after a latency of five: not ready at 14, ready at 15; and the product's 7 end at 22."""
    code = [
        Sync(0),
        Load(0, 0, Loops(160), post=Token.LOADED),
        compute(7, Token.LOADED, Token.COMPUTED),
        Store(0, 0, Loops(16), 1, wait=Token.COMPUTED),
        Halt(),
    ]
    times = schedule(program_of(code), machine(5, True))
    assert times.ended[0].tolist() == [15]
    assert times.started[1].tolist() == [15]
    assert times.requested[2].tolist() == [22]
    assert times.cycles == 22 + 5 + 1


@pytest.mark.parametrize(("pipelined", "second"), [(True, 10), (False, 15)])
def test_the_channel_is_free_when_the_data_have_passed(pipelined: bool, second: int) -> None:
    code = [Load(0, 0, Loops(160)), Load(0, 0, Loops(16)), Halt()]
    times = schedule(program_of(code), machine(5, pipelined))
    assert times.started[0].tolist() == [0, second]
    assert times.ended[0].tolist() == [15, second + 6]


def test_the_oldest_request_is_served_first_and_a_store_before_a_load_of_the_same_cycle() -> None:
    """Load B waits for the channel from 0 on, C and the store are both released at 6: B, store, C."""
    code = [
        Load(0, 0, Loops(160)),
        Load(0, 0, Loops(160)),
        compute(6, post=Token.FREED | Token.COMPUTED),
        Load(0, 0, Loops(160), wait=Token.FREED),
        Store(0, 0, Loops(160), 1, wait=Token.COMPUTED),
        Halt(),
    ]
    times = schedule(program_of(code), machine(0, True))
    assert times.started[0].tolist() == [0, 10, 30]
    assert times.started[2].tolist() == [20]


def test_a_request_pays_one_latency_and_its_runs_whole_bursts() -> None:
    """Runs of 5 bytes, 3 times: 3 bursts of 8; rows that follow each other, 4 of 10: 40 bytes, 5 bursts. 64 / 16."""
    spec = replace(load_spec("edge_16x16"), dram=DramSpec(16.0, 9, 8, True))
    code = [
        Load(0, 0, Loops(5, (1, 1, 3), (0, 0, 7), (0, 0, 5))),
        Load(0, 0, Loops(10, (1, 1, 4), (0, 0, 10), (0, 0, 10)), chained=True),
        Halt(),
    ]
    times = schedule(program_of(code), spec)
    assert times.columns.moved_bytes.tolist() == [24, 40, 0]
    assert times.columns.payload_bytes.tolist() == [15, 40, 0]
    assert times.cycles == 9 + 4


def test_runs_merge_from_the_inside_out() -> None:
    """The middle loop continues the inner one; the outer one skips a byte; of two it makes two runs of 24 bytes."""
    spec = replace(load_spec("edge_16x16"), dram=DramSpec(16.0, 0, 16, True))
    code = [Load(0, 0, Loops(4, (2, 3, 2), (25, 8, 4), (24, 8, 4))), Halt()]
    assert schedule(program_of(code), spec).columns.moved_bytes[0] == 2 * 32


def test_a_barrier_waits_for_all_queues() -> None:
    code = [Load(0, 0, Loops(160)), Sync(0), compute(3), Sync(1), Halt()]
    times = schedule(program_of(code), machine(5, True))
    assert times.barriers.tolist() == [15, 18, 18]
    assert times.started[1].tolist() == [15]


def test_a_deadlock_names_all_queues_that_wait() -> None:
    code = [
        compute(1, Token.LOADED, Token.COMPUTED),
        Load(0, 0, Loops(1), wait=Token.FREED, post=Token.LOADED),
        compute(1, post=Token.FREED),
        Store(0, 0, Loops(1), 1, wait=Token.COMPUTED),
        Halt(),
    ]
    with pytest.raises(DeadlockError) as raised:
        schedule(program_of(code), machine(0, True))
    assert raised.value.index == 0
    assert str(raised.value) == (
        "instruction 0: deadlock: execute at 0 waits for LOADED; load at 1 waits for FREED; "
        "store at 3 waits for COMPUTED"
    )


@pytest.mark.parametrize(
    ("code", "index", "said"),
    [
        ([], 0, "the last instruction"),
        ([Sync(0)], 0, "the last instruction"),
        ([Halt(), Halt()], 0, "a Halt that is not the last"),
        ([Load(0, 0, Loops(1), chained=True), Halt()], 0, "without one before it"),
        ([Load(0, 0, Loops(1)), Sync(0), Load(0, 0, Loops(1), chained=True), Halt()], 2, "behind a barrier"),
        ([Load(0, 0, Loops(1), post=Token.LOADED), Halt()], 1, "1 LOADED left over"),
        ([Load(0, 0, Loops(1), wait=Token.COMPUTED), Halt()], 0, "never waits for"),
        ([compute(1, post=Token.STORED), Halt()], 0, "never posts"),
        ([Load(0, 0, Loops(-1)), Halt()], 0, "a transfer of"),
        ([Store(0, 0, Loops(8), 3), Halt()], 0, "no multiple"),
        ([Store(0, 0, Loops(8), 8), Store(0, 0, Loops(8), 8, to_scratchpad=True, chained=True), Halt()], 1, "one way"),
    ],
)
def test_what_cannot_run_is_refused_with_its_index(code: list, index: int, said: str) -> None:
    with pytest.raises(ProgramError, match=said) as raised:
        schedule(program_of(code), machine(0, True))
    assert raised.value.index == index
