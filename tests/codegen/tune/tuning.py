"""Doubles of the tuner's neighbours: a space of numbers and a measurer that knows what each takes.

Run as a program, ``tuning.py DATABASE LOG WORKLOADS TRIALS``, it tunes slowly and logs every trial before it answers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from codegen.tune.database import Database
from codegen.tune.device import Device
from codegen.tune.measuring import Job, Timing
from codegen.tune.proposals import TemplateProposer
from codegen.tune.schedule import Schedule
from codegen.tune.tuner import Stopping, Tuner
from codegen.tune.workload import Workload

DEVICE = Device({"kind": "llvm"}, "scripted", 1, 512, 32)


def conv(out: int, size: int = 8) -> Workload:
    return Workload.parse(f"conv 1x16x{size}x{size} -> {out}, kernel 3x3, pads 1,1,1,1, float32")


class Numbers:
    """The schedules ``tile`` = 0, 1, ..., the first the default."""

    def __init__(self, count: int) -> None:
        self._all = [Schedule.of("tiles", tile=tile) for tile in range(count)]

    def default(self, workload: Workload, device: Device) -> Schedule:
        return self._all[0]

    def space(self, workload: Workload, device: Device) -> list[Schedule]:
        return self._all

    def adapted(self, schedule: Schedule, of: Workload, to: Workload, device: Device) -> Schedule | None:
        return schedule if schedule in self._all else None


class KnownTimes:
    """A measurer: ``seconds(workload, schedule)``, None for a broken one. ``asked``: every job it took up."""

    device = DEVICE

    def __init__(self, seconds: Callable[[Workload, Schedule], float | None]) -> None:
        self._seconds = seconds
        self.asked: list[Job] = []
        self.given_up = 0

    def measure(self, jobs: Sequence[Job]) -> Iterator[Timing]:
        done = 0
        try:
            for job in jobs:
                self.asked.append(job)
                seconds = self._seconds(job.workload, job.schedule)
                timing = Timing(job, seconds, seconds, seconds, "" if seconds is not None else "it broke", "double")
                done += 1
                yield timing
        finally:
            self.given_up += len(jobs) - done

    def close(self) -> None:
        pass


def tuner(path: Path, measurer: KnownTimes, count: int = 100) -> Tuner:
    return Tuner(Database(path, "1"), measurer, TemplateProposer(DEVICE, Numbers(count)))


def main(database: str, log: str, workloads: str, trials: str) -> None:
    def slow(workload: Workload, schedule: Schedule) -> float | None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{workload.work.out_channels} {schedule['tile']}\n")
        time.sleep(0.005)
        tile = schedule["tile"]
        return None if tile % 7 == 6 else 1e-3 / (1 + tile * workload.work.out_channels % 11)

    works = [conv(out) for out in range(1, int(workloads) + 1)]
    stopping = Stopping(int(trials), patience=10**6, attainable=10.0)
    tuner(Path(database), KnownTimes(slow)).tune(works, stopping)


if __name__ == "__main__":
    main(*sys.argv[1:])
