"""The measuring process's side of :mod:`codegen.tune.worker`: builds and times what it is told to, line by line.

Every line is a JSON object with the number of its job; answers carry it back. What native code prints goes to stderr.

    {"id": 1, "device": {...}, "measuring": [1], "building": [0]}    {"id": 1, "where": "pid 4711"}
    {"id": 2, "build": {"workload": "conv ...", "schedule": {...}}}  {"id": 2}  or  {"id": 2, "error": "..."}
    {"id": 2, "calls": 200, "limit_s": 2.0}                          {"id": 2, "samples": [4.7e-05, ...]}
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Collection
from typing import Any, Protocol

from codegen.child_process import end_with_parent
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload

LARGEST_ERROR = 1e-3
"""Of an output, relative to the largest value: a kernel that differs by more computes something else."""


class Kernel(Protocol):
    """A kernel that is built, with its arguments."""

    def output_error(self) -> float:
        """Runs it once; the largest difference from the reference, relative to the reference's largest value."""
        ...

    def time(self, calls: int) -> list[float]:
        """Seconds of single calls, after some to warm up."""
        ...


Builder = Callable[[Workload, Schedule], Kernel]


def serve(start: Callable[[Device], Builder]) -> None:
    """Answers until there are no more questions. ``start`` loads what builds for the device."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    hello = json.loads(sys.stdin.readline())
    device = Device(**hello["device"])
    build = start(device)
    answers.write(json.dumps({"id": hello["id"], "where": f"pid {os.getpid()}"}) + "\n")
    kernel: Kernel | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            if "build" in request:
                kernel = None
                _pin(hello["building"])
                job = request["build"]
                kernel = _checked(build, Workload.parse(job["workload"]), Schedule.from_json(job["schedule"]))
            else:
                assert kernel is not None, "nothing was built"
                _pin(hello["measuring"])
                answer["samples"] = _samples(kernel, request["calls"], request["limit_s"])
        except Exception as error:  # whatever the compiler raises on a schedule that does not fit: the trial is broken
            answer["error"] = _one_line(error)
        answers.write(json.dumps(answer) + "\n")


def _checked(build: Builder, workload: Workload, schedule: Schedule) -> Kernel:
    kernel = build(workload, schedule)
    error = kernel.output_error()
    if not error <= LARGEST_ERROR:  # nan is none
        raise ValueError(f"it computes something else: the output differs by {error:.2g} of its largest value")
    return kernel


def _samples(kernel: Kernel, calls: int, limit_s: float) -> list[float]:
    """At most ``calls`` calls; fewer where they would take longer than ``limit_s``."""
    first = kernel.time(1)
    more = min(calls - 1, int(limit_s / first[0]))
    return first + kernel.time(more) if more > 0 else first


def _pin(cores: Collection[int]) -> None:
    if cores and sys.platform == "linux":
        os.sched_setaffinity(0, cores)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TVM's errors begin with the frames that they came through and end with what is wrong.
    said = lines[-1] if lines else ""
    return f"{type(error).__name__}: {said}"[:300]
