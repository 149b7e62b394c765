import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from codegen.events import RecordingEvents
from codegen.tune.database import Database
from codegen.tune.measuring import Job
from codegen.tune.schedule import Schedule
from codegen.tune.tuner import Stopping
from codegen.tune.workload import Workload
from tests.codegen.tune.tuning import DEVICE, KnownTimes, conv, tuner

HERE = Path(__file__).resolve().parent
NEVER = 10**6


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tune.jsonl"


def tiles(jobs: list[Job]) -> list[int]:
    return [job.schedule["tile"] for job in jobs]


def trials(count: int) -> Stopping:
    """That many, whatever they give."""
    return Stopping(count, patience=NEVER, attainable=10.0)


def test_every_workload_has_something_before_one_has_more(path: Path) -> None:
    measurer = KnownTimes(lambda workload, schedule: 1e-3)
    works = [conv(out) for out in (8, 16, 24, 32, 40)]
    summary = tuner(path, measurer).tune([*works, works[0]], trials(3))
    order = [job.workload for job in measurer.asked]
    assert order == works * 3
    assert tiles(measurer.asked)[:5] == [0] * 5
    assert [o.workload for o in summary.outcomes] == works
    assert all((o.trials, o.measured, o.broken, o.ended) == (3, 3, 0, "trials") for o in summary.outcomes)


def test_the_best_is_found_and_the_default_stands_beside_it(path: Path) -> None:
    measurer = KnownTimes(lambda workload, schedule: 1e-3 + abs(schedule["tile"] - 5) * 1e-4)
    subject = tuner(path, measurer)
    assert subject.latency(conv(8)) is None
    (outcome,) = subject.tune([conv(8)], trials(20)).outcomes
    assert outcome.best is not None and outcome.best.schedule == Schedule.of("tiles", tile=5)
    assert outcome.default is not None and outcome.default.seconds == 1e-3 + 5e-4
    assert subject.latency(conv(8)) == 1e-3
    assert len(set(tiles(measurer.asked))) == 20


def test_known_trials_count_and_are_not_repeated(path: Path) -> None:
    first = KnownTimes(lambda workload, schedule: 1e-3)
    tuner(path, first).tune([conv(8), conv(16)], trials(5))
    second = KnownTimes(lambda workload, schedule: 1e-3)
    summary = tuner(path, second).tune([conv(8), conv(16), conv(24)], trials(7))
    asked = Counter(job.workload for job in second.asked)
    assert asked == {conv(8): 2, conv(16): 2, conv(24): 7}
    both = [(job.workload, job.schedule) for job in (*first.asked, *second.asked)]
    assert len(set(both)) == len(both) == 21
    assert [o.measured for o in summary.outcomes] == [2, 2, 7] and summary.measured == 11
    third = KnownTimes(lambda workload, schedule: 1e-3)
    assert tuner(path, third).tune([conv(8)], trials(7)).measured == 0 and third.asked == []


def test_a_neighbour_s_best_is_tried_second(path: Path) -> None:
    measurer = KnownTimes(lambda workload, schedule: 1e-3 / (1 + (schedule["tile"] == 60)))
    tuner(path, measurer).tune([conv(8)], trials(100))
    measurer.asked.clear()
    tuner(path, measurer).tune([conv(12)], trials(2))
    assert tiles(measurer.asked) == [0, 60]


def test_no_gain_for_long_ends_it(path: Path) -> None:
    # The gains: tile 0, then tile 1; 0.5 % (tile 2) is none.
    seconds = {0: 2e-3, 1: 1e-3, 2: 0.995e-3}
    measurer = KnownTimes(lambda workload, schedule: seconds.get(schedule["tile"], 3e-3))
    events = RecordingEvents()
    works = [conv(out) for out in (8, 16, 24, 32)]  # four at a time: one trial of each a round
    summary = tuner(path, measurer).tune(works, Stopping(50, patience=5, attainable=10.0), events)
    assert [(o.ended, o.measured) for o in summary.outcomes] == [("patience", 7)] * 4
    assert events.steps == {"tune": 200}  # what is left out is done, so that the time left is right


def test_a_kernel_as_fast_as_any_ends_it(path: Path) -> None:
    rate = 5e10  # multiply-adds a second that the first workload reaches
    measurer = KnownTimes(lambda workload, schedule: workload.work.macs / rate)
    tuner(path, measurer).tune([conv(8)], trials(6))
    summary = tuner(path, measurer).tune([conv(16)], Stopping(50, patience=NEVER, attainable=0.97))
    assert [(o.ended, o.measured <= 8) for o in summary.outcomes] == [("attainable", True)]
    slower = KnownTimes(lambda workload, schedule: workload.work.macs / (0.9 * rate))
    summary = tuner(path, slower).tune([conv(24)], Stopping(9, patience=NEVER, attainable=0.97))
    assert [(o.ended, o.measured) for o in summary.outcomes] == [("trials", 9)]


def test_a_small_space_ends_it(path: Path) -> None:
    measurer = KnownTimes(lambda workload, schedule: 1e-3)
    summary = tuner(path, measurer, count=6).tune([conv(8)], trials(50))
    assert sorted(tiles(measurer.asked)) == list(range(6))
    assert summary.outcomes[0].ended == "exhausted"


def test_broken_trials_are_counted_and_a_workload_without_others_is_named(path: Path) -> None:
    def seconds(workload: Workload, schedule: Schedule) -> float | None:
        return None if workload == conv(16) or schedule["tile"] % 2 == 0 else 1e-3

    events = RecordingEvents()
    measurer = KnownTimes(seconds)
    summary = tuner(path, measurer).tune([conv(8), conv(16)], Stopping(6), events)
    good, bad = summary.outcomes
    assert good.default is None and good.best is not None and 0 < good.broken < good.trials and good.error == "it broke"
    assert bad.best is None and bad.trials == bad.broken == 6 and summary.unusable == (bad,)
    assert events.warnings == [f"{conv(16).key}: every trial of 6 broke: it broke"]
    again = tuner(path, measurer)
    measurer.asked.clear()
    assert again.tune([conv(16)], Stopping(6)).measured == 0 and measurer.asked == []


def test_time_ends_it_and_nothing_is_lost(path: Path) -> None:
    measurer = KnownTimes(lambda workload, schedule: 1e-3)
    subject = tuner(path, measurer)
    works = [conv(out) for out in (8, 16, 24)]
    summary = subject.tune(works, trials(10), out_of_time=lambda: len(measurer.asked) >= 8)
    assert not summary.complete and summary.measured == 8
    assert measurer.given_up == 1  # of the third round of three
    assert {o.ended for o in summary.outcomes} == {"time"}
    assert sorted(o.trials for o in summary.outcomes) == [2, 3, 3]
    assert subject.tune(works, trials(10)).complete
    assert len(measurer.asked) == 30


def test_an_interrupt_keeps_what_was_measured(path: Path) -> None:
    def seconds(workload: Workload, schedule: Schedule) -> float:
        if len(measurer.asked) == 5:
            raise KeyboardInterrupt
        return 1e-3

    measurer = KnownTimes(seconds)
    with pytest.raises(KeyboardInterrupt):
        tuner(path, measurer).tune([conv(8), conv(16)], trials(10))
    assert len(Database(path, "1").records()) == 4


def test_a_measurer_that_forgets_a_job_is_found_out(path: Path) -> None:
    measurer = KnownTimes(lambda workload, schedule: 1e-3)
    measurer.measure = lambda jobs: iter(())  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="gave no answer for conv 1x16x8x8 -> 8"):
        tuner(path, measurer).tune([conv(8)], trials(3))


def test_fast_kernels_are_called_more_often(path: Path) -> None:
    measurer = KnownTimes(lambda workload, schedule: 1e-3 if workload == conv(8) else 1e-7)
    tuner(path, measurer).tune([conv(8), conv(16)], trials(2))
    repeats = {(job.workload, job.schedule["tile"]): job.repeats for job in measurer.asked}
    # 0.04 s of calls, at least 20 of them, at most 400.
    assert repeats[conv(8), 1] == 40 and repeats[conv(16), 1] == 400


def test_a_killed_run_goes_on_where_it_was(path: Path, tmp_path: Path) -> None:
    """kill -9 five times at any moment: every trial but the one in work is kept, and none that is kept is repeated."""
    log = tmp_path / "log"
    # The kills are behind some 60 trials: far enough from the end for one that comes late on a busy machine.
    command = [sys.executable, str(HERE / "tuning.py"), str(path), str(log), "6", "36"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    moments = random.Random(6)
    for kill in range(6):
        before = len(log.read_text().splitlines()) if log.exists() else 0
        run = subprocess.Popen(command, env=environment)
        if kill < 5:
            goal = before + moments.randint(3, 12)
            end = time.monotonic() + 200
            while not log.exists() or len(log.read_text().splitlines()) < goal:
                assert time.monotonic() < end and run.poll() is None
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.006))
            run.kill()
        assert (run.wait() == 0) == (kill == 5)
        asked = log.read_text().splitlines()
        heard: list[str] = []
        kept = Database(path, "1", warn=heard.append).records()
        assert len(asked) - len(kept) <= kill + 1  # those in work when it was killed
        assert heard == [] or "unfinished" in heard[0]
    assert len(kept) == 216
    repeated = Counter(asked)
    assert len(asked) - len(repeated) <= 5 and max(repeated.values()) <= 2  # in work when it was killed
    assert set(Counter(record.workload for record in kept).values()) == {36}


def test_two_processes_tune_into_one_database(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    logs = [tmp_path / "first", tmp_path / "second"]
    runs = [
        subprocess.Popen([sys.executable, str(HERE / "tuning.py"), str(path), str(log), "40", "3"], env=environment)
        for log in logs
    ]
    assert [run.wait() for run in runs] == [0, 0]
    database = Database(path, "1")
    for out in range(1, 41):
        assert len(database.trials(conv(out), DEVICE)) >= 3
    asked = [line for log in logs for line in log.read_text().splitlines()]
    assert len(database.records()) == len(set(asked))
    assert len(path.read_bytes().splitlines()) == 1 + len(asked)
    # They share the work. Alone each makes 120 trials; of what both begin at once some are made twice.
    assert len(asked) < 1.7 * 120
