import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from codegen.tune.device import Device
from codegen.tune.measuring import Job, Timing
from codegen.tune.schedule import Schedule
from codegen.tune.worker import LocalMeasurer
from codegen.tune.workload import Workload
from passes.errors import InputError

HERE = Path(__file__).resolve().parent
DEVICE = Device({"kind": "llvm"}, "scripted", 1, 512, 32)
CONV = Workload.parse("conv 1x16x32x32 -> 16, kernel 3x3, pads 1,1,1,1, float32")


@pytest.fixture(autouse=True)
def _scripted_child_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def job(ns: int = 1000, repeats: int = 10, **params: int | str) -> Job:
    return Job(CONV, Schedule.of("scripted", ns=ns, **params), repeats)


def measurer(processes: int = 1, timeout_s: float = 20.0, device: Device = DEVICE) -> LocalMeasurer:
    return LocalMeasurer(device, processes=processes, timeout_s=timeout_s, module="scripted_worker_child")


@pytest.fixture(scope="module")
def one() -> Iterator[LocalMeasurer]:
    os.environ["PYTHONPATH"], before = str(HERE), os.environ.get("PYTHONPATH", "")
    with measurer() as found:
        yield found
    os.environ["PYTHONPATH"] = before


def single(measurer: LocalMeasurer, job: Job) -> Timing:
    (timing,) = measurer.measure([job])
    return timing


def test_a_timing_is_minimum_tenth_percentile_and_median(one: LocalMeasurer) -> None:
    # The double is asked for 1 call and then for 19: 1 + 1/1, and 1 + 1/1 ... 1 + 1/19 microseconds.
    timing = single(one, job(1000, repeats=20))
    # Sorted from the fastest: 1 + 1/19, 1 + 1/18 (the second of 20 is the tenth percentile), ..., the tenth and
    # eleventh are 1 + 1/10 and 1 + 1/9.
    assert timing.seconds == pytest.approx(1e-6 * (1 + 1 / 19), rel=1e-12)
    assert timing.p10 == pytest.approx(1e-6 * (1 + 1 / 18), rel=1e-12)
    assert timing.median == pytest.approx(1e-6 * (1 + (1 / 10 + 1 / 9) / 2), rel=1e-12)
    assert timing.error == "" and timing.where.startswith("pid ")


def test_a_slow_kernel_is_called_less_often(one: LocalMeasurer) -> None:
    # The first takes 0.5 s * (1 + 1/1); the limit of 2 s has room for 2 more, the fastest of 0.5 s * (1 + 1/2).
    assert single(one, job(500_000_000, repeats=100)).seconds == pytest.approx(0.75, rel=1e-12)
    # One that takes longer than the limit is timed once.
    assert single(one, job(5_000_000_000, repeats=100)).seconds == pytest.approx(10.0, rel=1e-12)


@pytest.mark.parametrize(
    ("does", "error"),
    [
        ("crash", "the process crashed (SIGSEGV)"),
        ("exit", "the process ended with 3: the last words"),
        ("raise", "ValueError: loop of 7 does not divide 16"),
        ("wrong", "ValueError: it computes something else: the output differs by 0.5 of its largest value"),
        ("nan", "ValueError: it computes something else: the output differs by nan of its largest value"),
        ("garbage", "the process answered garbage"),
    ],
)
def test_a_broken_kernel_is_one_broken_trial(one: LocalMeasurer, does: str, error: str) -> None:
    before, broken, after = one.measure([job(1000), job(1, does=does), job(2000)])
    assert broken.error == error and broken.seconds is broken.p10 is broken.median is None
    assert before.seconds is not None and after.seconds == pytest.approx(2 * before.seconds, rel=1e-12)


@pytest.mark.parametrize("does", ["hang", "slow build"])
def test_a_hang_is_ended(does: str) -> None:
    with measurer(timeout_s=3.0) as hasty:  # enough for the double on a busy machine
        assert single(hasty, job(does=does)).error == "the process took longer than 3 s"
        assert single(hasty, job()).error == ""


def test_what_a_library_prints_is_no_answer(one: LocalMeasurer) -> None:
    assert single(one, job(does="print")).error == ""


def test_every_job_is_answered_once_by_two_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [job(1000 + n, does="crash" if n % 5 == 3 else "log", file=str(log)) for n in range(20)]
    with measurer(processes=2) as both:
        timings = list(both.measure(jobs))
    assert sorted((t.job.schedule["ns"], bool(t.error)) for t in timings) == [(1000 + n, n % 5 == 3) for n in range(20)]
    assert len(set(log.read_text().split())) >= 2
    assert len(log.read_text().split()) == 16


def test_a_caller_that_stops_gets_its_next_jobs_answered(one: LocalMeasurer) -> None:
    timings = one.measure([job(1000), job(3, does="hang"), job(4)])
    assert next(timings).job == job(1000)
    timings.close()  # type: ignore[attr-defined]
    assert single(one, job(7000)).job == job(7000)


def test_a_process_that_does_not_start_is_no_broken_trial() -> None:
    unknown = Device({"kind": "llvm"}, "unknown", 1, 512, 32)
    with (
        measurer(device=unknown) as none,
        pytest.raises(InputError, match=r"does not start: it ended with 1: .*there is no compiler for it"),
    ):
        single(none, job())


def test_the_processes_die_with_their_parent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "from test_worker import *\n"
        f"with measurer() as one:\n    list(one.measure([job(does='log', file={str(log)!r}), job(does='hang')]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2])])}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    child = wait_for(lambda: int(log.read_text()) if log.exists() and log.read_text().endswith("\n") else None)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: None if alive(child) else True)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(value):  # type: ignore[no-untyped-def]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = value()
        if found is not None:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen within a minute")
