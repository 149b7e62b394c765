"""The seam between the tuner and whatever compiles and measures: a process on this host, or a farm of devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload


@dataclass(frozen=True)
class Job:
    """One trial: ``repeats`` single calls of the kernel after a few to warm up."""

    workload: Workload
    schedule: Schedule
    repeats: int


@dataclass(frozen=True)
class Timing:
    """What a job gave. ``seconds``: the minimum of the calls, None where it failed; ``p10`` and ``median`` likewise.

    ``error``: one line, empty where it did not fail. ``where``: the device or process that measured it.
    """

    job: Job
    seconds: float | None
    p10: float | None
    median: float | None
    error: str = ""
    where: str = ""


class Measurer(Protocol):
    """Compiles and measures jobs. A job that crashes or hangs is answered with its error, and the next one is done."""

    device: Device

    def measure(self, jobs: Sequence[Job]) -> Iterator[Timing]:
        """One timing for each job, in the order in which they are ready."""
        ...

    def close(self) -> None: ...
