"""Proposals from TVM's MetaSchedule, as an alternative to our templates: drawn at random, or by evolution.

They are drawn in a process of their own, some at a time because a draw takes seconds, and are schedules like any other:
a trace as a text. So the same processes measure them, the same database keeps them, and a network is built with them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict

from codegen.farm.process import ChildProcess
from codegen.tune.device import Device
from codegen.tune.proposals import Space, SpaceProposer
from codegen.tune.record import Record
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from passes.errors import UnsupportedError

_AT_ONCE = 8
_DRAW_S = 300.0


class MetaScheduleProposer(SpaceProposer):
    """:class:`codegen.tune.proposals.Proposer`: the templates' default first, then traces of MetaSchedule's space.

    With ``evolutionary`` a batch of traces descends from the fastest that were known when it was drawn. Raises
    UnsupportedError where a space cannot be drawn from, or the drawing process fails.
    """

    def __init__(self, device: Device, space: Space, *, evolutionary: bool = False, seed: int = 0) -> None:
        super().__init__(device, space, seed)
        self.name = "evolutionary" if evolutionary else "metaschedule"
        self._setup = json.dumps({"device": asdict(device), "evolutionary": evolutionary})
        self._child: ChildProcess | None = None
        self._drawn: dict[Workload, list[Schedule]] = {}

    def propose(
        self, workload: Workload, known: Sequence[Record], neighbours: Sequence[Record], count: int
    ) -> list[Schedule]:
        tried = {record.schedule for record in known}
        found = [schedule for schedule in [self.default(workload)] if schedule not in tried]
        if len(found) < count:
            waiting = [schedule for schedule in self._drawn.get(workload, []) if schedule not in tried]
            if not waiting:
                waiting = self._draw(workload, known)
            wanted = count - len(found)
            found += waiting[:wanted]
            self._drawn[workload] = waiting[wanted:]
        return found[:count]

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _draw(self, workload: Workload, known: Sequence[Record]) -> list[Schedule]:
        if self._child is None:
            environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = ChildProcess("codegen.tvm_metaschedule_child", self._setup, environment)
        self._child.send(
            {
                "workload": workload.key,
                "known": [[r.schedule.to_json(), r.seconds] for r in known if r.seconds is not None],
                "count": _AT_ONCE,
                # Another draw for every workload and every step, and the same one where a run is repeated.
                "seed": zlib.crc32(f"{self._seed} {workload.key} {len(known)}".encode()),
            }
        )
        answer = self._child.first(_DRAW_S)
        if answer is None:
            reason = self._child.ended() or f"took longer than {_DRAW_S:g} s"
            self.close()
            raise UnsupportedError(f"{workload.key}: the process that draws schedules {reason}")
        if "error" in answer:
            raise UnsupportedError(f"{workload.key}: MetaSchedule has no schedules: {answer['error']}")
        tried = {record.schedule for record in known}
        return [s for s in map(Schedule.from_json, answer["schedules"]) if s not in tried]
