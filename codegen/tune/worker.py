"""Measures on this host, in processes of their own: a kernel that crashes or hangs costs one trial.

A process builds a kernel, checks what it computes, waits until the measuring cores are its own, and times it there.
With two processes one builds while the other measures; never do two measure at once.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from codegen.closing import Closing
from codegen.tune.device import Device
from codegen.tune.measuring import Job, Timing
from codegen.tune.statistics import summary
from passes.errors import InputError

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 300.0
_MEASURING_LIMIT_S = 2.0
_LONGEST_LINE_BYTES = 1 << 24


class LocalMeasurer(Closing):
    """A :class:`codegen.tune.measuring.Measurer` of this host. Close it, or use it as a context manager.

    ``processes`` of ``module`` build, one of them measures at a time, on the last ``device.threads`` of the cores that
    this process may use. ``timeout_s``: what the building of a kernel, or its timing, may take before its process is
    killed and the trial is broken. A slow kernel is called less often than a job asks for: for about 2 s.
    InputError where the processes do not start.
    """

    def __init__(
        self,
        device: Device,
        *,
        processes: int = 1,
        timeout_s: float = 30.0,
        module: str = "codegen.tvm_worker_child",
    ) -> None:
        self.device = device
        self._processes = processes
        self._timeout_s = timeout_s
        self._module = module
        cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        self._measuring = cores[-device.threads :]
        self._building = cores[: -device.threads] or cores
        self._children: list[_Child] = []

    def close(self) -> None:
        for child in self._children:
            child.kill()
        self._children.clear()

    def measure(self, jobs: Sequence[Job]) -> Iterator[Timing]:
        """One timing for each job, as they get ready. What is in work when the caller stops is given up."""
        waiting = deque(jobs)
        left = len(waiting)
        try:
            while left:
                wanted = min(self._processes, left)
                while len(self._children) < wanted:
                    self._children.append(self._start())
                for child in self._children:
                    if child.idle and waiting:
                        child.build(waiting.popleft(), self._timeout_s)
                built = [child for child in self._children if child.built]
                if built and not any(child.timing for child in self._children):
                    min(built, key=lambda child: child.deadline).time(self._timeout_s)
                for child in self._ready():
                    timing = child.advance()
                    if timing is not None:
                        left -= 1
                        yield timing
                    if child.dead:
                        self._children.remove(child)
        finally:
            for child in [child for child in self._children if not child.idle]:
                child.kill()
                self._children.remove(child)

    def _ready(self) -> list[_Child]:
        """Those that have said something or died, or whose time is over; waits for the first."""
        working = [child for child in self._children if child.working]
        with selectors.DefaultSelector() as selector:
            for child in working:
                selector.register(child.answers, selectors.EVENT_READ, child)
            wait = max(0.0, min(child.deadline for child in working) - time.monotonic())
            said = [key.data for key, _ in selector.select(wait)]
        now = time.monotonic()
        return said or [child for child in working if child.deadline <= now]

    def _start(self) -> _Child:
        child = _Child(self._module, self.device.threads)
        hello = {"device": asdict(self.device), "measuring": self._measuring, "building": self._building}
        child.greet(hello)
        return child


class _Child:
    """One measuring process and its job. ``deadline``: when what it does should be done, by the monotonic clock."""

    def __init__(self, module: str, threads: int) -> None:
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TVM_NUM_THREADS": str(threads),
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdout is not None
        self.answers = self._process.stdout
        self._where = f"pid {self._process.pid}"
        self._ids = itertools.count(1)
        self._id = 0
        self._job: Job | None = None
        self._unread = b""
        self.built = self.timing = self.dead = False
        self.deadline = 0.0

    @property
    def idle(self) -> bool:
        return self._job is None and not self.dead

    @property
    def working(self) -> bool:
        return self._job is not None and not self.built

    def greet(self, hello: dict[str, Any]) -> None:
        """Waits until the process is ready for work."""
        self._ask(hello, _START_S)
        answer: dict[str, Any] | str | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while answer is None:
                selector.select(max(0.0, self.deadline - time.monotonic()))
                answer = self._answer()
        if isinstance(answer, str):
            raise InputError(f"the measuring process does not start: it {answer}")

    def build(self, job: Job, timeout_s: float) -> None:
        self._job = job
        self._ask({"build": {"workload": job.workload.key, "schedule": job.schedule.to_json()}}, timeout_s)

    def time(self, timeout_s: float) -> None:
        assert self._job is not None
        self.built, self.timing = False, True
        self._ask({"calls": self._job.repeats, "limit_s": _MEASURING_LIMIT_S}, timeout_s, same=True)

    def advance(self) -> Timing | None:
        """Takes what the process has said; the timing where its job is done."""
        answer = self._answer()
        if answer is None:
            return None
        job = self._job
        assert job is not None
        was_timing = self.timing
        self.timing = False
        if isinstance(answer, str):
            return self._done(Timing(job, None, None, None, f"the process {answer}", self._where))
        if "error" in answer:
            return self._done(Timing(job, None, None, None, " ".join(str(answer["error"]).split()), self._where))
        if not was_timing:
            self.built = True
            return None
        try:
            found = summary(answer["samples"])
        except (KeyError, TypeError, ValueError) as error:
            self.kill()
            return self._done(Timing(job, None, None, None, f"the process answered no times: {error}", self._where))
        return self._done(Timing(job, found.seconds, found.p10, found.median, "", self._where))

    def kill(self) -> None:
        self.dead = True
        self._process.kill()
        self._process.wait()
        self._log.close()
        self.answers.close()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a question that it did not live to read
            self._process.stdin.close()

    def _done(self, timing: Timing) -> Timing:
        self._job = None
        self.built = self.timing = False
        return timing

    def _ask(self, request: dict[str, Any], timeout_s: float, *, same: bool = False) -> None:
        self._id = self._id if same else next(self._ids)
        self.deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: the end of its answers says so
            self._process.stdin.write(json.dumps({"id": self._id, **request}).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any] | str | None:
        """The answer, or what became of the process, which is dead then; None: it has not said everything yet."""
        if time.monotonic() >= self.deadline and not _readable(self.answers):
            self.kill()
            return f"took longer than {self._timeout_s:g} s"
        data = os.read(self.answers.fileno(), 1 << 16)
        if not data:
            return self._epitaph()
        self._unread += data
        line, newline, rest = self._unread.partition(b"\n")
        if not newline and len(self._unread) < _LONGEST_LINE_BYTES:
            return None
        self._unread = b""
        try:
            answer = json.loads(line)
            if rest or not isinstance(answer, dict) or answer.get("id") != self._id:
                raise ValueError("no answer to what was asked")
        except ValueError:
            self.kill()
            return "answered garbage"
        return answer

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace").strip().splitlines()
        said = f": {log[-1].strip()[:200]}" if log else ""
        self.kill()
        if code < 0:
            return f"crashed ({signal.Signals(-code).name}){said}"
        return f"ended with {code}{said}"


def _readable(stream: IO[bytes]) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(0))
