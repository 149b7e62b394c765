"""Trials on a processor that is made up: how long a kernel takes there is a formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from codegen.events import Events
from codegen.tune.device import Device
from codegen.tune.workload import Workload
from passes.core.cost import StageWork

DEVICE = Device({"kind": "llvm"}, "made up", 1, 512, 32)


class MadeUpTrials:
    """:class:`codegen.cpu_latency.Trials`: a kernel takes ``truth_s`` of its work once it was tried.

    ``times``: what is known from the beginning. ``rounds`` lists what was tried together.
    """

    def __init__(self, truth_s: Callable[[StageWork], float], times: Mapping[Workload, float] | None = None) -> None:
        self.truth_s = truth_s
        self.times = dict(times or {})
        self.rounds: list[list[Workload]] = []

    def best_s(self, workload: Workload) -> float | None:
        return self.times.get(workload)

    def measured(self) -> Mapping[Workload, float]:
        return dict(self.times)

    def wanting(self, workloads: Sequence[Workload]) -> list[Workload]:
        return [w for w in workloads if w not in self.times]

    def make(self, workloads: Sequence[Workload], events: Events, out_of_time: Callable[[], bool]) -> int:
        self.rounds.append(list(workloads))
        self.times |= {w: self.truth_s(w.work) for w in workloads}
        return len(workloads)
