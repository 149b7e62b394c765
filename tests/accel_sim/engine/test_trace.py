"""Traces hold what the schedule holds, and are what viewers load."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from accel_sim.engine import Result, run
from accel_sim.engine.trace import TRACKS
from accel_sim.program.isa import Queue
from tests.accel_sim.engine.step_programs import machine, program_of, random_code
from tests.accel_sim.program.sample_programs import SPEC, two_layers


@pytest.fixture(scope="module")
def result() -> Result:
    return run(two_layers(), SPEC, {}, values=False)


@pytest.fixture(scope="module")
def events(result: Result) -> list[dict[str, Any]]:
    return list(json.loads(result.chrome_trace())["traceEvents"])


def test_every_track_has_its_name(events: list[dict[str, Any]]) -> None:
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == dict(enumerate(TRACKS))


def test_every_event_is_one_that_viewers_know(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert event["ph"] in {"M", "X", "b", "e", "i"}
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] > 0
    opened = [(event["cat"], event["id"], event["name"]) for event in events if event["ph"] == "b"]
    closed = [(event["cat"], event["id"], event["name"]) for event in events if event["ph"] == "e"]
    assert sorted(opened) == sorted(closed)


def test_units_do_one_thing_at_a_time_and_all_of_it(result: Result, events: list[dict[str, Any]]) -> None:
    busy = {
        "channel": sum(layer.channel_cycles for layer in result.layers),
        "execute": result.activities["execute"]["busy"],
        "layers": result.cycles,
    }
    for track, cycles in busy.items():
        own = sorted(
            (event["args"]["begin_cycles"], event["args"]["end_cycles"])
            for event in events
            if event["ph"] == "X" and TRACKS[event["tid"]] == track
        )
        assert all(end <= begin for (_, end), (begin, _) in pairwise(own))
        assert sum(end - begin for begin, end in own) == cycles


def test_microseconds_and_names(result: Result, events: list[dict[str, Any]]) -> None:
    layers = [event for event in events if event["ph"] == "X" and event["cat"] == "layers"]
    assert [event["name"] for event in layers] == [marker.name for marker in two_layers().markers]
    assert layers[1]["ts"] == pytest.approx(result.layers[0].cycles / SPEC.clock_mhz, rel=1e-12)
    (call,) = [event for event in events if event.get("cat") == "host"]
    assert (call["name"], call["ts"]) == ("softmax", pytest.approx(result.cycles / SPEC.clock_mhz, rel=1e-12))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bins", [1, 7, 400])
def test_a_timeline_holds_all_busy_cycles(seed: int, bins: int) -> None:
    result = run(program_of(random_code(seed, 40)), machine(3, True), {}, values=False)
    picture = result.timeline(bins)
    cycles = dict(zip(picture.tracks, (picture.busy * np.diff(picture.edges)).sum(axis=1), strict=True))
    items = result.schedule.columns.items
    expected = {
        "load": items[Queue.LOAD].cycles.sum(),
        "store": items[Queue.STORE].cycles[~items[Queue.STORE].local].sum(),
        "array": 0,
        "vector": items[Queue.EXECUTE].cycles.sum(),
        "to scratchpad": items[Queue.STORE].cycles[items[Queue.STORE].local].sum(),
    }
    assert cycles == pytest.approx({track: float(value) for track, value in expected.items()}, rel=1e-9, abs=1e-9)
    assert picture.busy.min() >= 0
    assert picture.busy.max() <= 1 + 1e-9


def test_a_timeline_is_busy_where_the_schedule_is() -> None:
    """Bins of one cycle: busy in exactly those in which a unit works."""
    result = run(program_of(random_code(11, 40)), machine(3, True), {}, values=False)
    picture = result.timeline(result.cycles)
    part = result.schedule.columns.items[Queue.EXECUTE]
    expected = np.zeros(result.cycles)
    for begin, cycles in zip(result.schedule.started[Queue.EXECUTE], part.cycles, strict=True):
        expected[begin : begin + cycles] = 1
    np.testing.assert_allclose(picture.busy[picture.tracks.index("vector")], expected, atol=1e-9)


def test_an_empty_program_has_a_trace_too() -> None:
    result = run(program_of([*random_code(0, 1)[-1:]]), machine(3, True), {}, values=False)
    assert result.cycles == 0
    json.loads(result.chrome_trace())
    assert not result.timeline(5).busy.any()
