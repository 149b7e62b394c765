from __future__ import annotations

from collections.abc import Sequence

import pytest

from codegen.farm.roster import Limits, Look, Roster

CALLS = 300


def look(seconds: float, *, wall: float = 1.0, error: float = 1e-6, disturbed: Sequence[float] = ()) -> Look:
    """``CALLS`` calls of ``seconds``, for which ``wall`` times as long passed here."""
    samples = [seconds] * CALLS + list(disturbed)
    return Look(samples, wall * sum(samples), 0.0, error)


def verdicts(roster: Roster, name: str, looked: Look, now: float = 0.0) -> list[str | None]:
    """Looks until there is a verdict; each sees the same."""
    found: list[str | None] = []
    while not found or found[-1] is None:
        found.append(roster.judge(name, looked, now))
        assert len(found) < 50
    return found


def test_an_honest_device_is_believed_at_once() -> None:
    roster = Roster(Limits())
    assert verdicts(roster, "a", look(50e-6)) == [""]
    assert verdicts(roster, "b", look(60e-6, wall=1.2, disturbed=[1e-3] * 50)) == [""]
    (a, b) = roster.report(0.0)
    assert (a.reference_s, b.reference_s) == (50e-6, 60e-6)
    assert (a.dropped, b.dropped) == ("", "")


@pytest.mark.parametrize("error", [0.01, float("nan"), float("inf")])
def test_wrong_outputs_are_final(error: float) -> None:
    roster = Roster(Limits())
    (verdict,) = verdicts(roster, "a", look(50e-6, error=error))
    assert verdict is not None and verdict.startswith("its outputs are wrong")
    assert not roster.usable("a", 1e9)


def test_more_time_than_passed_is_final_and_less_is_looked_at_again() -> None:
    roster = Roster(Limits(looks=4))
    # 300 calls of 50 us are 15 ms
    assert verdicts(roster, "a", look(50e-6, wall=0.5)) == [
        "its times are wrong: it reports 15 ms for calls that took 7.5 ms"
    ]
    assert verdicts(roster, "b", look(50e-6, wall=3.0)) == [None] * 3 + [
        "its times are wrong: it reports 15 ms for calls that took 45 ms"
    ]
    assert roster.judge("c", look(50e-6, wall=3.0), 0.0) is None
    assert roster.judge("c", look(50e-6, wall=1.1), 0.0) == ""


def test_the_way_of_a_request_is_not_the_devices_time() -> None:
    roster = Roster(Limits())
    far = Look([50e-6] * CALLS, 0.015 + 0.100, 0.100, 0.0)
    assert roster.judge("a", far, 0.0) == ""


def test_of_two_devices_the_slower_goes() -> None:
    roster = Roster(Limits(apart=2.0, looks=3))
    assert verdicts(roster, "slow", look(150e-6)) == [""]
    assert verdicts(roster, "fast", look(50e-6)) == [""]
    assert verdicts(roster, "slow", look(150e-6)) == [None] * 2 + [
        "unlike the others of its key: the reference kernel takes 150 us, the other device 50 us"
    ]
    assert roster.usable("fast", 0.0) and not roster.usable("slow", 1e9)


def test_among_several_the_odd_one_goes_be_it_slow_or_fast() -> None:
    for odd in (150e-6, 20e-6):
        roster = Roster(Limits(apart=2.0))
        for name, seconds in (("a", 50e-6), ("b", 52e-6), ("c", 49e-6)):
            assert roster.judge(name, look(seconds), 0.0) == ""
        verdict = verdicts(roster, "odd", look(odd))[-1]
        assert verdict is not None and verdict.startswith("unlike the others of its key")
        assert [roster.usable(name, 0.0) for name in ("a", "b", "c", "odd")] == [True] * 3 + [False]


def test_a_device_that_is_unsteady_rests_and_comes_back() -> None:
    roster = Roster(Limits(apart=2.0, looks=2, rest_s=30.0))
    assert roster.judge("a", look(50e-6), 0.0) == ""
    assert verdicts(roster, "a", look(150e-6), now=10.0) == [
        None,
        "unsteady: the reference kernel took 50 us, and now takes 150 us",
    ]
    assert [roster.usable("a", now) for now in (10.0, 39.9, 40.0)] == [False, False, True]
    # it may be another processor's speed for good: what it shows when it comes back is what counts
    assert roster.judge("a", look(150e-6), 40.0) == ""


def test_a_disturbance_that_passes_is_forgiven() -> None:
    roster = Roster(Limits(apart=2.0))
    assert roster.judge("a", look(50e-6), 0.0) == ""
    assert roster.judge("a", look(150e-6), 0.0) is None
    assert roster.judge("a", look(51e-6), 0.0) == ""


def test_lost_sessions_in_a_row_send_a_device_to_rest_longer_each_time() -> None:
    roster = Roster(Limits(failures=3, rest_s=30.0))
    for _ in range(2):
        roster.failed("a", "the session broke off", 0.0)
    assert roster.judge("a", look(50e-6), 0.0) == ""  # the job was to blame
    for _ in range(2):
        roster.failed("a", "the session broke off", 0.0)
    assert roster.usable("a", 0.0)
    roster.failed("a", "the session broke off", 0.0)
    assert not roster.usable("a", 29.0)
    assert roster.report(29.0)[0].dropped == "rests: the session broke off"
    for _ in range(3):
        roster.failed("a", "the session broke off", 30.0)
    assert [roster.usable("a", now) for now in (89.0, 90.0)] == [False, True]
    assert roster.report(90.0)[0].failures == 2 + 2 + 1 + 3
    assert "8 failures, the last: the session broke off" in str(roster.report(90.0)[0])
    roster.present(())
    assert roster.report(90.0)[0].dropped == "gone: the session broke off"


def test_jobs_that_go_well_elsewhere_count_against_a_device_that_looks_fine() -> None:
    roster = Roster(Limits(failures=3))
    for _ in range(3):
        assert roster.usable("a", 0.0)
        roster.failed("a", "a job took longer than 20 s", 0.0)
        assert roster.judge("a", look(50e-6), 0.0) == ""
        roster.outdone("a", 0.0)
    assert not roster.usable("a", 0.0)
