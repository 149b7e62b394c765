"""A farm on loopback, and kernels that are built once for all tests of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from codegen.farm.measurer import REFERENCE
from codegen.farm.process import ChildProcess
from codegen.farm.serve import Farm
from codegen.tune import spaces
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from tests.codegen.farm.prebuilt_child import name_of

DEVICE = Device({"kind": "llvm", "num-cores": 1}, "any", 1, 128, 16)
WORKLOAD = Workload.parse("conv 1x8x16x16 -> 8, kernel 3x3, pads 1,1,1,1, float32")


@pytest.fixture(scope="session")
def device() -> Device:
    """Any processor of this architecture: 128-bit vectors are SSE2's and NEON's."""
    return DEVICE


@pytest.fixture(scope="session")
def workload() -> Workload:
    return WORKLOAD


@pytest.fixture(scope="session")
def schedules() -> list[Schedule]:
    return spaces.space(WORKLOAD, DEVICE)[:4]


@pytest.fixture(scope="session")
def prebuilt(tmp_path_factory: pytest.TempPathFactory, schedules: list[Schedule]) -> Iterator[str]:
    """The name of the builder module that gives what the real one has built."""
    folder = tmp_path_factory.mktemp("prebuilt")
    setup = json.dumps({"device": asdict(DEVICE), "folder": str(folder)})
    builder = ChildProcess("codegen.farm.build_child", setup, {})
    index: dict[str, dict[str, str]] = {}
    try:
        assert builder.first(120) == {"ready": True}, builder.log()
        wanted = [{"workload": REFERENCE.key, "schedule": None}]
        wanted += [{"workload": WORKLOAD.key, "schedule": schedule.to_json()} for schedule in schedules]
        for number, request in enumerate(wanted):
            builder.send({"id": number, **request})
            answer = builder.first(120)
            assert answer is not None and "error" not in answer, (answer, builder.log())
            index[name_of(request)] = answer
    finally:
        builder.kill()
    path = folder / "index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    os.environ["FARM_PREBUILT"] = str(path)
    yield "tests.codegen.farm.prebuilt_child"
    del os.environ["FARM_PREBUILT"]


@pytest.fixture
def farm() -> Iterator[Farm]:
    with Farm(port=0) as started:
        yield started


def processes(groups: set[int]) -> set[int]:
    """Processes of this machine that belong to one of the process groups, zombies left out."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) in groups and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.fixture
def gone() -> Callable[[set[int]], bool]:
    """True once no process of the groups is left; the kernel may take a moment."""

    def check(groups: set[int]) -> bool:
        until = time.monotonic() + 60
        while processes(groups) and time.monotonic() < until:
            time.sleep(0.05)
        return not processes(groups)

    return check
