from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from codegen.farm.address import FarmError
from codegen.farm.measurer import FarmMeasurer
from codegen.farm.pool import Rules
from codegen.farm.process import ChildProcess
from codegen.farm.roster import DeviceReport, Limits
from codegen.farm.serve import Farm, Server
from codegen.farm.tracker import status
from codegen.library_timing import Contender, time_together
from codegen.tune.device import Device
from codegen.tune.measuring import Job, Timing
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from passes.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
FAULTY = "tests.codegen.farm.faulty_server"
RULES = Rules(deadline_s=30.0, lease_s=120.0, patience_s=60.0)
"""Nothing takes that long, not on a busy machine either; tests of what does have rules of their own."""


@pytest.fixture
def jobs(workload: Workload, schedules: list[Schedule]) -> list[Job]:
    """Sixteen jobs, no two the same."""
    return [Job(workload, schedule, 20 + i) for i in range(4) for schedule in schedules]


@pytest.fixture
def measurer(
    farm: Farm, device: Device, prebuilt: str, gone: Callable[[set[int]], bool]
) -> Iterator[Callable[..., FarmMeasurer]]:
    """Makes measurers of the farm's devices, of which nothing is left afterwards, nor of the farm."""
    made: list[FarmMeasurer] = []

    def make(rules: Rules = RULES, **further: object) -> FarmMeasurer:
        options = {"rules": rules, "build_module": prebuilt, "builders": 1, **further}
        made.append(FarmMeasurer(farm.tracker.host, farm.tracker.port, "lab", device, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    assert farm._process is not None
    groups = {farm._process.pid, *(server.process.pid for server in farm.servers)}
    for one in made:
        groups |= {lane.process.pid for lane in one._pool.lanes}
        groups |= {builder.process.pid for builder in one._pool.builders}
        one.close()
    farm.close()
    assert sys.platform != "linux" or gone(groups)


def measured_until(condition: Callable[[], object], measurer: FarmMeasurer, jobs: list[Job]) -> list[Timing]:
    """Measures the jobs again and again until ``condition`` is met; all timings, of which none has an error.

    Which device is ready first, and how many of the jobs the others get, is not said.
    """
    timings: list[Timing] = []
    until = time.monotonic() + 200
    while not condition() and time.monotonic() < until:
        found = list(measurer.measure(jobs))
        assert answered_once(found, jobs)
        assert [timing.error for timing in found] == [""] * len(jobs)
        timings += found
    return timings


def faulty(farm: Farm, fault: str) -> Server:
    return farm.add_server("lab", module=FAULTY, environment={"FARM_FAULT": fault})


def answered_once(timings: list[Timing], jobs: list[Job]) -> bool:
    return Counter(timing.job for timing in timings) == Counter(jobs)


def report(measurer: FarmMeasurer, server: Server) -> DeviceReport:
    return {device.name: device for device in measurer.summary().devices}[str(server.address)]


def test_two_devices_share_the_jobs(farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]) -> None:
    names = {str(farm.add_server("lab").address) for _ in range(2)}
    farm.add_server("another")
    lab = measurer()
    timings = measured_until(lambda: {d.name for d in lab.summary().devices if d.jobs} == names, lab, jobs)
    assert {timing.where for timing in timings} == names
    assert all(t.seconds is not None and t.p10 is not None and t.median is not None for t in timings)
    assert all(0 < t.seconds <= t.p10 <= t.median for t in timings)  # type: ignore[operator]
    # 147456 multiply-adds: a core does 1 to 200 GFLOP/s of them
    assert all(1e-6 < t.seconds < 3e-4 for t in timings)  # type: ignore[operator]
    summary = lab.summary()
    assert (summary.jobs, summary.failed) == (len(timings), 0)
    assert {device.name: device.dropped for device in summary.devices} == dict.fromkeys(names, "")
    assert sum(device.jobs for device in summary.devices) == len(timings)
    assert json.loads(json.dumps(summary.to_json()))["key"] == "lab"
    farm_line, *device_lines = summary.lines()
    assert farm_line == f"farm {farm.tracker}, key lab: {len(timings)} jobs, 0 without a time, 0 tried again"
    assert all("jobs, the reference kernel takes " in line for line in device_lines)
    assert list(lab.measure([])) == []


def test_a_device_killed_in_mid_run_loses_no_job(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    """It dies after two jobs of a session, which wait for its second look then, in that look or in a third job."""
    farm.add_server("lab")
    dying = faulty(farm, "die=7")
    lab = measurer()
    timings = measured_until(dying.process.ended, lab, jobs)
    assert report(lab, dying).failures == 1
    assert report(lab, dying).jobs == sum(timing.where == str(dying.address) for timing in timings)
    assert lab.summary().retries in (2, 3)
    assert dying.process.ended() == "crashed (SIGKILL)"


def test_lying_devices_are_dropped_with_figures(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("the device that computes wrong outputs needs g++")
    good = farm.add_server("lab")
    reasons = {
        str(faulty(farm, "times=0.2").address): "its times are wrong: it reports",
        str(faulty(farm, "times=4").address): "its times are wrong: it reports",
        str(faulty(farm, "outputs").address): "its outputs are wrong: by 0.01 of the largest value",
    }
    said: list[str] = []
    lab = measurer(tell=said.append)
    until = time.monotonic() + 200
    while len(said) < 3 and time.monotonic() < until:
        timings = list(lab.measure(jobs))
        assert answered_once(timings, jobs)
        assert {timing.where for timing in timings} == {str(good.address)}
    dropped = {device.name: device.dropped for device in lab.summary().devices if device.dropped}
    assert set(dropped) == set(reasons)
    for name, reason in reasons.items():
        assert dropped[name].startswith(reason)
        assert f"device {name} is not used: {dropped[name]}" in said


def test_a_device_unlike_the_other_of_its_key_is_dropped(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    good, slow = farm.add_server("lab"), faulty(farm, "slow=4")
    lab = measurer()
    until = time.monotonic() + 200
    where: set[str] = set()
    while not any(device.dropped for device in lab.summary().devices) and time.monotonic() < until:
        timings = list(lab.measure(jobs))
        assert answered_once(timings, jobs)
        where = {timing.where for timing in timings}
    assert where == {str(good.address)}
    assert report(lab, slow).dropped.startswith("unlike the others of its key: the reference kernel takes ")


def test_a_job_that_hangs_is_given_to_another_device(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    good, hanging = farm.add_server("lab"), faulty(farm, "hang=3")
    lab = measurer(Rules(deadline_s=6.0, patience_s=60.0))
    failed = str(hanging.address)
    timings = measured_until(lambda: any(d.name == failed and d.failures for d in lab.summary().devices), lab, jobs)
    assert {timing.where for timing in timings} == {str(good.address)}
    assert report(lab, hanging).failed == "a job took longer than 6 s"
    assert lab.summary().retries == 1


@pytest.mark.slow
def test_a_device_that_hangs_is_back_when_its_lease_is_over(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    """Nobody can stop a kernel from here: the device ends the session, and whoever asked it goes on waiting."""
    hanging = faulty(farm, "hang=3")
    lab = measurer(Rules(tries=2, deadline_s=6.0, lease_s=13.0, patience_s=60.0))
    timings = list(lab.measure(jobs[:1]))
    assert timings[0].error == f"failed 2 times, {2 * f'{hanging.address}: a job took longer than 6 s; '}".rstrip("; ")
    assert report(lab, hanging).dropped == ""


def test_a_session_that_crashes_costs_the_device_nothing_but_the_job(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    """Each session ends in its third job; what was timed before counts as soon as the device is looked at again."""
    crashing = faulty(farm, "crash=7")
    lab = measurer()
    timings = list(lab.measure(jobs[:6]))
    assert answered_once(timings, jobs[:6])
    assert [timing.error for timing in timings] == [""] * 6
    assert report(lab, crashing).failures >= 2
    assert report(lab, crashing).dropped == ""
    assert report(lab, crashing).failed == "the session broke off"


def test_a_job_that_fails_everywhere_is_answered_with_its_error(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    """No session gets beyond its first job."""
    faulty(farm, "crash=3")
    timings = list(measurer(replace(RULES, tries=2)).measure(jobs[:1]))
    assert timings[0].seconds is None
    assert timings[0].error.startswith("failed 2 times, 127.0.0.1:")
    assert timings[0].error.count("the session broke off") == 2


def test_without_any_device_left_the_error_names_them(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    dying = faulty(farm, "die=7")
    lab = measurer(replace(RULES, patience_s=5.0))
    timings = []
    with pytest.raises(FarmError) as error:
        for timing in lab.measure(jobs):
            timings.append(timing)
    assert str(error.value) == (
        f"no device of key 'lab' at {farm.tracker} is left, and none came back in 5 s "
        f"({dying.address}: the session broke off); 16 of the jobs are not measured"
    )
    # the same jobs go on where it stopped, as soon as there is a device again
    farm.add_server("lab")
    assert answered_once(list(lab.measure(jobs)), jobs)


def test_a_key_without_devices_is_told_what_there_is(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    farm.add_server("other")
    with pytest.raises(FarmError, match=r"has no device of key 'lab', it has other \(1\); 16 of the jobs"):
        list(measurer(Rules(patience_s=0.5)).measure(jobs))


def test_a_caller_that_stops_early_gets_the_devices_back_at_once(
    farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]
) -> None:
    farm.add_server("lab")
    lab = measurer(Rules(jobs=2))
    running = lab.measure(jobs)
    first = next(running)
    assert first.error == ""
    running.close()  # type: ignore[attr-defined]
    assert answered_once(list(lab.measure(jobs[:3])), jobs[:3])


def test_a_tracker_that_dies_is_named(farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]) -> None:
    assert farm._process is not None
    lab = measurer(Rules(patience_s=0.5))
    with (
        no_more(farm),
        pytest.raises(FarmError, match=f"no RPC tracker answers at {farm.tracker}.*16 of the jobs are not"),
    ):
        list(lab.measure(jobs))
    with pytest.raises(FarmError, match="no RPC tracker answers"):
        FarmMeasurer(farm.tracker.host, farm.tracker.port, "lab", lab.device)


@contextmanager
def no_more(farm: Farm) -> Iterator[None]:
    assert farm._process is not None
    farm._process._process.kill()
    farm._process._process.wait()
    yield


def test_what_is_built_here_and_cannot_run_elsewhere_is_an_answer(
    farm: Farm, device: Device, jobs: list[Job], workload: Workload
) -> None:
    """With the real builder: a schedule that no template knows, and one that is measured."""
    farm.add_server("lab")
    wrong = Job(workload, Schedule.of("no such template"), 20)
    with FarmMeasurer(farm.tracker.host, farm.tracker.port, "lab", device, rules=RULES, builders=1) as lab:
        timings = {timing.job: timing for timing in lab.measure([jobs[0], wrong])}
    assert timings[jobs[0]].error == "" and timings[jobs[0]].seconds is not None
    assert timings[wrong].seconds is None and timings[wrong].error and "\n" not in timings[wrong].error
    assert timings[wrong].where == "the compiler"


def test_a_measurer_that_is_killed_gives_its_devices_back(
    farm: Farm, device: Device, prebuilt: str, jobs: list[Job], gone: Callable[[set[int]], bool], tmp_path: Path
) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent has died")
    farm.add_server("lab")
    code = (
        "import time\n"
        "from codegen.farm.measurer import FarmMeasurer\n"
        "from codegen.farm.pool import Rules\n"
        "from tests.codegen.farm.conftest import DEVICE, WORKLOAD\n"
        "from codegen.tune import spaces\n"
        "from codegen.tune.measuring import Job\n"
        f"lab = FarmMeasurer({farm.tracker.host!r}, {farm.tracker.port}, 'lab', DEVICE, builders=1,\n"
        f"    build_module={prebuilt!r}, rules=Rules(jobs=1))\n"
        "running = lab.measure([Job(WORKLOAD, s, 20) for s in spaces.space(WORKLOAD, DEVICE)[:4]])\n"
        "next(running)\n"
        "print(*(p.process.pid for p in (*lab._pool.lanes, *lab._pool.builders)), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as measuring:
        assert measuring.stdout is not None
        groups = set(map(int, measuring.stdout.readline().split()))
        assert len(groups) == 2
        measuring.kill()
    assert gone(groups)
    until = time.monotonic() + 20
    while not status(farm.tracker.host, farm.tracker.port).group("lab").free and time.monotonic() < until:
        time.sleep(0.05)
    assert status(farm.tracker.host, farm.tracker.port).group("lab").free == 1


@pytest.mark.parametrize(("triple", "machine"), [("aarch64-linux-gnu", 183), ("riscv64-linux-gnu", 243)])
def test_kernels_are_built_for_the_devices_processor(
    triple: str, machine: int, workload: Workload, schedules: list[Schedule], tmp_path: Path
) -> None:
    """183 and 243 are the machines' numbers in ELF headers."""
    device = Device({"kind": "llvm", "mtriple": triple, "num-cores": 1}, triple, 1, 128, 16)
    builder = ChildProcess(
        "codegen.farm.build_child", json.dumps({"device": asdict(device), "folder": str(tmp_path)}), {}
    )
    try:
        assert builder.first(120) == {"ready": True}
        builder.send({"id": 1, "workload": workload.key, "schedule": schedules[0].to_json()})
        answer = builder.first(120)
    finally:
        builder.kill()
    assert answer is not None and "error" not in answer, answer
    library = Path(answer["library"])
    if any(shutil.which(f"{triple}-{compiler}") for compiler in ("g++", "gcc")):
        headers = [library.read_bytes()[:20]]
    else:
        with tarfile.open(library) as archive:
            objects = [archive.extractfile(member) for member in archive if member.name.endswith(".o")]
            headers = [found.read(20) for found in objects if found is not None]
    assert headers and {int.from_bytes(header[18:20], "little") for header in headers} == {machine}


def test_limits_decide_what_is_a_lie(farm: Farm, measurer: Callable[..., FarmMeasurer], jobs: list[Job]) -> None:
    """A device that reports half of its times took twice as long by the clock here."""
    faulty(farm, "times=0.5")
    lax = measurer(limits=Limits(clock=5.0))
    assert [timing.error for timing in lax.measure(jobs[:2])] == ["", ""]
    strict = measurer(replace(RULES, patience_s=5.0), limits=Limits(clock=1.5))
    with pytest.raises(FarmError, match="its times are wrong"):
        list(strict.measure(jobs[:2]))


@pytest.mark.slow
def test_networks_take_turns_on_one_device(farm: Farm, measurer: Callable[..., FarmMeasurer], tmp_path: Path) -> None:
    import onnx

    from codegen.tvm_build import Binary, build
    from tests.onnx_models import normal, onnx_model

    contenders = []
    x = normal(8, 16)
    for width in (16, 1024):
        body = "net (float[8,16] x) => (float[8,8] y) {\n t = MatMul (x, u)\n r = Relu (t)\n y = MatMul (r, v)\n}"
        path = tmp_path / f"{width}.onnx"
        onnx.save(onnx_model(body, {"u": normal(16, width), "v": normal(width, 8, seed=1)}), path)
        binary = build(path, tmp_path / f"{width}.so", {})
        assert isinstance(binary, Binary), binary
        contenders.append(Contender.of(path.name, binary, {"x": x}))
    farm.add_server("lab")
    lab = measurer()
    narrow, wide = lab.network(contenders, blocks=4, calls=5)
    assert (narrow.name, wide.name) == ("16.onnx", "1024.onnx")
    for samples, width in ((narrow, 16), (wide, 1024)):
        assert samples.seconds.shape == (4, 5) and (samples.seconds > 0).all()
        expected = np.maximum(x @ normal(16, width), 0) @ normal(width, 8, seed=1)
        np.testing.assert_allclose(samples.outputs[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert wide.seconds.min() > 4 * narrow.seconds.min()  # 64 times the multiply-adds
    assert lab.network_device == str(farm.servers[0].address)
    # here and on the device, it is the same processor
    (here,) = time_together(contenders[1:], blocks=4, calls=20)
    assert 1 / 10 < here.seconds.min() / wide.seconds.min() < 10

    missing = tmp_path / "missing.so"
    missing.write_bytes(b"nothing that can be loaded")
    with pytest.raises(FarmError, match="the networks were not measured"):
        lab.network([Contender("missing", missing, {"x": x})], blocks=1, calls=1)
    with pytest.raises(UsageError, match=r"1024.onnx cannot be timed on a device"):
        lab.network([Contender("file", tmp_path / "1024.onnx", {"x": x})], blocks=1, calls=1)
    with pytest.raises(UsageError, match="run 1 threads, they cannot time 2"):
        lab.network(contenders, blocks=1, calls=1, threads=2)
