"""What to try next for a workload: the template's own schedule, what served its neighbours, then the space.

A proposal depends on what is known and on the seed alone: nothing is lost when a run ends and another one goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from codegen.tune.device import Device
from codegen.tune.record import Record
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload


class Space(Protocol):
    """The schedules of a workload. :mod:`codegen.tune.spaces` is one."""

    def default(self, workload: Workload, device: Device) -> Schedule:
        """Good without a trial."""
        ...

    def space(self, workload: Workload, device: Device) -> list[Schedule]:
        """Finite, from promising to not."""
        ...

    def adapted(self, schedule: Schedule, of: Workload, to: Workload, device: Device) -> Schedule | None:
        """A neighbour's schedule made to fit; None where it cannot."""
        ...


class Proposer(Protocol):
    """Where schedules to try come from."""

    name: str

    def default(self, workload: Workload) -> Schedule:
        """What a kernel is built with before anything was tried."""
        ...

    def propose(
        self, workload: Workload, known: Sequence[Record], neighbours: Sequence[Record], count: int
    ) -> list[Schedule]:
        """At most ``count`` schedules that are not ``known``, the most promising first; [] where there are no more.

        ``neighbours``: the best trials of similar workloads, the most similar first.
        """
        ...

    def close(self) -> None: ...


class SpaceProposer:
    """Proposes schedules of ``space``, of which the default is the first one."""

    def __init__(self, device: Device, space: Space, seed: int) -> None:
        self._device = device
        self._space = space
        self._seed = seed

    def default(self, workload: Workload) -> Schedule:
        return self._space.default(workload, self._device)

    def close(self) -> None:
        pass


class TemplateProposer(SpaceProposer):
    """Of our own templates: the default, the neighbours' best, the space's head, then around the best and at random.

    Of three proposals behind the head one is the next of the space, one the nearest to the best so far (by the number
    of parameters that differ), one is drawn.
    """

    name = "templates"

    def __init__(self, device: Device, space: Space, *, seed: int = 0, head: int = 4) -> None:
        super().__init__(device, space, seed)
        self._head = head
        self._spaces: dict[Workload, list[Schedule]] = {}

    def propose(
        self, workload: Workload, known: Sequence[Record], neighbours: Sequence[Record], count: int
    ) -> list[Schedule]:
        tried = {record.schedule for record in known}
        found: list[Schedule] = []

        def new(schedules: Iterator[Schedule] | list[Schedule]) -> Schedule | None:
            return next((s for s in schedules if s not in tried), None)

        lead = [self.default(workload), *self._adapted(workload, neighbours)]
        space = self._spaces.get(workload)
        if space is None:
            space = self._spaces[workload] = self._space.space(workload, self._device)
        timed = [record for record in known if record.seconds is not None]
        best = min(timed, key=lambda record: record.seconds or 0.0, default=None)
        while len(found) < count:
            step = len(tried)
            chosen = new(lead)
            if chosen is None and step >= self._head and best is not None and step % 3 == 1:
                chosen = new(sorted(space, key=lambda s: _differences(s, best.schedule)))
            if chosen is None and step >= self._head and step % 3 == 2:
                drawn = random.Random(f"{self._seed} {workload.key} {step}")
                left = [s for s in space if s not in tried]
                chosen = drawn.choice(left) if left else None
            if chosen is None:
                chosen = new(space)
            if chosen is None:
                break
            tried.add(chosen)
            found.append(chosen)
        return found

    def _adapted(self, workload: Workload, neighbours: Sequence[Record]) -> list[Schedule]:
        made = (
            self._space.adapted(record.schedule, Workload.parse(record.workload), workload, self._device)
            for record in neighbours
        )
        return [schedule for schedule in made if schedule is not None]


def _differences(first: Schedule, second: Schedule) -> int:
    """How many parameters differ; another template differs in all."""
    if first.template != second.template:
        return len(first.params) + len(second.params)
    return len(set(first.params) ^ set(second.params))
