"""A :class:`codegen.tune.measuring.Measurer` over the devices of a farm."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codegen.closing import Closing
from codegen.farm.address import Address, FarmError
from codegen.farm.dispatch import Dispatch
from codegen.farm.lane import START_S, Builder, Outcome, Task
from codegen.farm.pool import Pool, Rules
from codegen.farm.roster import DeviceReport, Limits, Roster
from codegen.farm.tracker import status
from codegen.library_timing import Contender, Samples, read_samples, write_feeds
from codegen.tune.device import Device
from codegen.tune.measuring import Job, Timing
from codegen.tune.statistics import summary
from codegen.tune.workload import Workload
from passes.core.cost import StageWork
from passes.core.site import Geometry
from passes.errors import UsageError

REFERENCE = Workload.of(StageWork(Geometry((3, 3), pads=(1, 1, 1, 1)), 32, 32, (16, 16)))
"""The kernel that devices are judged by: 2.4 million multiply-adds, 50 us on a good core."""

_MEASURING_S = 2.0
_NETWORK_S = 300.0
_MOST_BUILDERS = 8


@dataclass(frozen=True)
class FarmSummary:
    """What a farm did. ``retries``: of jobs, elsewhere or later; ``failed``: jobs that have no time."""

    tracker: str
    key: str
    devices: tuple[DeviceReport, ...]
    jobs: int
    failed: int
    retries: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for a person: a line for the farm, and one for each device."""
        tried = f"{self.failed} without a time, {self.retries} tried again"
        return [f"farm {self.tracker}, key {self.key}: {self.jobs} jobs, {tried}", *map(str, self.devices)]


class FarmMeasurer(Closing):
    """Builds kernels here and times them on the devices that the tracker at ``host``:``port`` has under ``key``.

    All devices of a key are taken for equal to ``device``. One that dies, hangs or lies is given up, its jobs go to
    others, and :meth:`summary` says so. A slow kernel is called less often than a job asks for: for about 2 s.
    ``builders`` processes compile, by default one for each core of this process, 8 at most. ``tell`` takes a line for
    each device that is given up. FarmError where no tracker answers, or no device is left.

    ``network_device``: the one that :meth:`network` measured on last.
    """

    def __init__(
        self,
        host: str,
        port: int,
        key: str,
        device: Device,
        *,
        rules: Rules | None = None,
        limits: Limits | None = None,
        builders: int | None = None,
        build_module: str = "codegen.farm.build_child",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        status(host, port)
        self.device = device
        self.network_device = ""
        self._folder = tempfile.TemporaryDirectory(prefix="rankc-farm-")
        setup = json.dumps({"device": asdict(device), "folder": self._folder.name})
        kind = str(device.target["kind"])
        self._pool = Pool(
            Address(host, port),
            key,
            "cpu" if kind == "llvm" else kind,
            rules or Rules(),
            Roster(limits or Limits()),
            lambda: Builder(build_module, setup),
            builders or min(_cores(), _MOST_BUILDERS),
            tell or (lambda _line: None),
        )
        self._ids = itertools.count(1)
        self._jobs = self._failed = 0

    def watch(self, tell: Callable[[str], None]) -> None:
        """From now on ``tell`` takes a line for each device that is given up."""
        self._pool.tell = tell

    def measure(self, jobs: Sequence[Job]) -> Iterator[Timing]:
        """One timing for each job, as they get certain: a device's times wait until it has been looked at again."""
        if not jobs:
            return
        self._prepare()
        given = {}
        for job in jobs:
            request = {"time": {"calls": job.repeats, "limit_s": _MEASURING_S}}
            build = {"workload": job.workload.key, "schedule": job.schedule.to_json()}
            given[Task(next(self._ids), build, request, self._pool.rules.deadline_s)] = job
        for outcome in Dispatch(self._pool, list(given)).run():
            yield self._timing(given[outcome.task], outcome)

    def network(
        self,
        contenders: Sequence[Contender],
        *,
        blocks: int,
        calls: int,
        threads: int = 1,
        timeout_s: float | None = None,
    ) -> list[Samples]:
        """What :func:`codegen.library_timing.time_together` does, on one device of the farm, the ``network_device``.

        The clock runs on the device. UsageError for an ONNX file, which no device has an engine for, and for another
        number of threads than the devices have; FarmError where it fails on every device that was tried.
        """
        for contender in contenders:
            if contender.path.suffix == ".onnx":
                raise UsageError(
                    f"{contender.path} cannot be timed on a device of a farm: it runs compiled libraries only"
                )
        if threads != self.device.threads:
            raise UsageError(f"devices of this farm run {self.device.threads} threads, they cannot time {threads}")
        self._prepare()
        given, made = Path(self._folder.name) / "inputs.npz", Path(self._folder.name) / "made.npz"
        write_feeds(given, contenders)
        request = {
            "libraries": [str(contender.path.absolute()) for contender in contenders],
            "inputs": [len(contender.feeds) for contender in contenders],
            "given": str(given),
            "made": str(made),
            "blocks": blocks,
            "calls": calls,
        }
        task = Task(next(self._ids), None, {"network": request}, timeout_s or _NETWORK_S)
        (outcome,) = Dispatch(self._pool, [task]).run()
        self._jobs += 1
        if outcome.answer is None:
            self._failed += 1
            raise FarmError(f"the networks were not measured: {outcome.error}")
        self.network_device = outcome.where
        return read_samples(made, contenders, outcome.answer["outputs"])

    def summary(self) -> FarmSummary:
        pool = self._pool
        return FarmSummary(
            str(pool.tracker), pool.key, pool.roster.report(time.monotonic()), self._jobs, self._failed, pool.retries
        )

    def close(self) -> None:
        """Ends every process that was started here, and gives the devices back with that."""
        self._pool.close()
        self._folder.cleanup()

    def _prepare(self) -> None:
        """Builds the reference kernel, once."""
        if self._pool.reference is not None:
            return
        builder = self._pool.new_builder()
        self._pool.builders.append(builder)
        task = Task(next(self._ids), {"workload": REFERENCE.key, "schedule": None}, {}, 0.0)
        builder.build(task, START_S)
        answer = builder.wait()
        if "error" in answer:
            self._pool.close()
            raise FarmError(f"the reference kernel cannot be built for {self.device.key}: {answer['error']}")
        self._pool.reference = {"library": answer["library"], "arguments": answer["arguments"]}

    def _timing(self, job: Job, outcome: Outcome) -> Timing:
        self._jobs += 1
        if outcome.answer is None:
            self._failed += 1
            return Timing(job, None, None, None, " ".join(outcome.error.split()), outcome.where)
        found = summary(outcome.answer["samples"])
        return Timing(job, found.seconds, found.p10, found.median, "", outcome.where)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
