"""What queues do in each cycle: against a machine that is stepped, cycle by cycle."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.engine import run
from accel_sim.engine.stalls import Activity, queue_activities
from accel_sim.engine.timing import schedule
from accel_sim.program.isa import Halt, Instruction, Load, Loops, Program, Queue, Store, Sync, Token
from accel_sim.spec import DramSpec, MachineSpec
from accel_sim.spec_file import load_spec
from tests.accel_sim.engine.step_programs import compute, machine, program_of, random_code
from tests.accel_sim.engine.stepped_machine import Machine, Work


def data_end(work: Work, queue: Queue, latency: int) -> int:
    on_channel = queue != Queue.EXECUTE and not work.local and work.cycles > 0
    return work.began + work.cycles + (latency if on_channel else 0)


def activity(works: list[Work], queue: Queue, now: int, latency: int) -> Activity:
    """What the oldest thing that has not ended does in cycle ``now``."""
    for work in works:
        if data_end(work, queue, latency) <= now:
            continue
        if now < work.asked:
            if queue == Queue.EXECUTE:
                return Activity.DATA if Token.LOADED in work.missing else Activity.ACCUMULATORS
            return Activity.BUFFER if queue == Queue.LOAD else Activity.RESULTS
        if now < work.began:
            return Activity.CHANNEL
        return Activity.LATENCY if now < data_end(work, queue, latency) - work.cycles else Activity.BUSY
    return Activity.BARRIER


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 30), st.integers(0, 9), st.booleans())
def test_every_cycle_of_random_programs(seed: int, length: int, latency: int, pipelined: bool) -> None:
    spec = replace(load_spec("edge_16x16"), dram=DramSpec(16.0, latency, 1, pipelined))
    program = program_of(random_code(seed, length))
    times = schedule(program, spec)
    stepped = Machine(spec)
    stepped.run(program)
    found = queue_activities(times)
    begin = 0
    for segment, end in enumerate(times.barriers.tolist()):
        for queue in Queue:
            part = times.columns.items[queue]
            works = [stepped.log[first] for first in part.first[part.segment == segment].tolist()]
            expected = Counter(activity(works, queue, now, latency) for now in range(begin, end))
            assert {kind: n for kind in Activity if (n := found[segment, queue, kind])} == expected
        begin = end


def activities(code: list[Instruction], spec: MachineSpec) -> dict[str, dict[str, int]]:
    return run(program_of(code), spec, {}, values=False).activities


def test_a_run_by_hand() -> None:
    """Two loads of 10 cycles and latency 5, the second one's latency behind the first one's data; each is computed
    on in 20 cycles; the store of 3 waits for the last result.
    """
    code = [
        Sync(0),
        Load(0, 0, Loops(160), post=Token.LOADED),
        Load(0, 0, Loops(160), post=Token.LOADED),
        compute(20, wait=Token.LOADED),
        compute(20, wait=Token.LOADED, post=Token.COMPUTED),
        Store(0, 0, Loops(48), 16, wait=Token.COMPUTED),
        Halt(),
    ]
    assert activities(code, machine(5, True)) == {
        "load": {"latency": 5, "busy": 20, "barrier": 38},
        "execute": {"data": 15, "busy": 40, "barrier": 8},
        "store": {"results": 55, "latency": 5, "busy": 3},
    }
    # One request at a time: the second waits for the channel while the first is all there is on it, then for its data.
    assert activities(code, machine(5, False))["load"] == {"latency": 10, "busy": 20, "barrier": 33}


def test_a_load_that_waits_while_a_store_is_served() -> None:
    """Both are released at 4; the store has the channel for 6 cycles of data, the load then 2."""
    code = [
        compute(4, post=Token.FREED | Token.COMPUTED),
        Load(0, 0, Loops(32), wait=Token.FREED),
        Store(0, 0, Loops(96), 16, wait=Token.COMPUTED),
        Halt(),
    ]
    found = activities(code, machine(0, True))
    assert found["load"] == {"buffer": 4, "channel": 6, "busy": 2}
    assert found["store"] == {"results": 4, "busy": 6, "barrier": 2}


def test_all_sums_are_the_cycles() -> None:
    program: Program = program_of(random_code(5, 60))
    result = run(program, machine(7, True), {}, values=False)
    assert result.cycles == sum(layer.cycles for layer in result.layers)
    for layer in result.layers:
        assert {sum(reasons.values()) for reasons in layer.activities.values()} <= {layer.cycles}
    assert {sum(reasons.values()) for reasons in result.activities.values()} == {result.cycles}
