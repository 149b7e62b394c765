"""Tunes workloads: what is known is taken from the database, what is not is proposed, measured and kept."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import nlargest

from codegen.events import Events, Progress, QuietEvents
from codegen.tune.database import Database
from codegen.tune.measuring import Job, Measurer, Timing
from codegen.tune.proposals import Proposer
from codegen.tune.record import Record
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload

_MEASURING_S = 0.04
"""Single calls are repeated for about so long: a few slices of the processor, one of which nobody disturbs."""

_FEWEST, _MOST = 20, 400
_SLOW_FLOPS = 10e9
"""Per second and core: how fast a kernel is taken to be before it was measured."""

_NEIGHBOURS = 2
_LEAD = 4
"""Trials until a workload knows more of itself than its neighbours can tell."""

_SHARED = 4
"""Trials after which a process looks at what others have done, where there are others."""

_GAIN = 0.01
"""Relative gain that counts as one: the minimum comes back within it."""


@dataclass(frozen=True)
class Stopping:
    """When a workload has had enough. ``trials``: known ones count too.

    ``patience``: trials without a gain of 1 % after which it ends. ``attainable``: share of the highest rate (multiply-
    adds a second) that any kernel of the device reached; a kernel that runs at it ends its workload's tuning.
    """

    trials: int
    patience: int | None = None
    attainable: float = 0.985

    @property
    def waits(self) -> int:
        return max(4, self.trials // 2) if self.patience is None else self.patience


@dataclass(frozen=True)
class Outcome:
    """What is known of a workload after tuning. ``measured`` trials are of this run, ``trials`` and ``broken`` of all.

    ``default``: the trial of the schedule that needs none, ``best`` the fastest; None where it was not tried or broke.
    ``error``: of the first broken trial. ``ended``: why there was no further trial: trials, patience, attainable,
    exhausted (the space), time.
    """

    workload: Workload
    default: Record | None
    best: Record | None
    trials: int
    broken: int
    measured: int
    error: str
    ended: str


@dataclass(frozen=True)
class Summary:
    """``outcomes`` in the order of the workloads asked for; ``complete``: time did not run out."""

    outcomes: tuple[Outcome, ...]
    complete: bool

    @property
    def measured(self) -> int:
        return sum(outcome.measured for outcome in self.outcomes)

    @property
    def broken(self) -> int:
        return sum(outcome.broken for outcome in self.outcomes)

    @property
    def unusable(self) -> tuple[Outcome, ...]:
        """Workloads of which every trial broke."""
        return tuple(outcome for outcome in self.outcomes if outcome.trials and outcome.best is None)


@dataclass
class _Task:
    """A workload under work."""

    workload: Workload
    default: Schedule
    left: int
    known: set[Schedule] = field(default_factory=set)
    measured: int = 0
    stale: int = 0
    best_s: float | None = None
    ended: str = ""


class Tuner:
    """Fills ``database`` with trials by ``measurer`` of what ``proposer`` proposes.

    Every trial is kept the moment it is measured, so whatever ends a run loses what was in work and nothing else. One
    process may tune while others read or tune as well: they share the work, and now and then measure a trial twice that
    both have begun.
    """

    def __init__(self, database: Database, measurer: Measurer, proposer: Proposer) -> None:
        self.database = database
        self._measurer = measurer
        self._proposer = proposer
        self.device = measurer.device
        self._foreign, self._rounds = database.foreign, 0

    def tune(
        self,
        workloads: Sequence[Workload],
        stopping: Stopping,
        events: Events | None = None,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> Summary:
        """Gives each workload its trials, in rounds: all have their first before one has its second.

        The same workload counts once. ``out_of_time`` is asked after every trial. Broken trials are kept and counted; a
        workload with no other is told as a warning.
        """
        events = events or QuietEvents()
        self.database.refresh()
        tasks = [
            _Task(workload, self._proposer.default(workload), stopping.trials) for workload in dict.fromkeys(workloads)
        ]
        for task in tasks:
            self._catch_up(task)
        complete = True
        with events.stage("tune", sum(max(0, task.left) for task in tasks)) as progress:
            while complete and (jobs := self._round(tasks, stopping, progress)):
                complete = self._measure(jobs, {task.workload: task for task in tasks}, progress, out_of_time)
            if not complete:
                self._round(tasks, stopping, progress)  # some may have had their last trial just then
        summary = Summary(tuple(self._outcome(task) for task in tasks), all(task.ended for task in tasks))
        for outcome in summary.unusable:
            events.warning(f"{outcome.workload.key}: every trial of {outcome.trials} broke: {outcome.error}")
        return summary

    def latency(self, workload: Workload) -> float | None:
        """Seconds of the fastest known kernel; None where none is known."""
        best = self.database.best(workload, self.device)
        return None if best is None else best.seconds

    def _catch_up(self, task: _Task) -> int:
        """Books the trials that earlier runs and other processes have made of the workload; returns how many."""
        new = [r for r in self.database.trials(task.workload, self.device) if r.schedule not in task.known]
        for record in new:
            _count(task, record.schedule, record.seconds)
        return len(new)

    def _round(self, tasks: list[_Task], stopping: Stopping, progress: Progress) -> list[Job]:
        """The next jobs: of each workload the same number, few enough that what they show can guide the next round."""
        rates = self._highest_rates()
        for task in tasks:
            if not task.ended and (others := self._catch_up(task)):
                progress.advance(others)
        open_tasks = [task for task in tasks if not task.ended and not self._ends(task, stopping, rates, progress)]
        each = max(1, 4 // max(1, len(open_tasks)))
        jobs = []
        for task in open_tasks:
            known = self.database.trials(task.workload, self.device)
            # What was never tried is measured by its default first, alone: it says what the others are worth.
            count = min(each if known else 1, task.left)
            neighbours = self.database.nearest(task.workload, self.device, _NEIGHBOURS) if len(known) < _LEAD else []
            chosen = self._proposer.propose(task.workload, known, neighbours, count)
            if not chosen:
                self._end(task, "exhausted", progress)
            jobs += [Job(task.workload, schedule, self._repeats(task)) for schedule in chosen]
        return jobs

    def _measure(
        self, jobs: list[Job], tasks: Mapping[Workload, _Task], progress: Progress, out_of_time: Callable[[], bool]
    ) -> bool:
        """Measures a round; False where time ran out.

        Where another process tunes into the same database, a round is done in an order of its own and a few jobs at a
        time, and what the other one has measured meanwhile is left out.
        """
        rest = list(jobs)
        first = not self._rounds and len(jobs) >= 4 * _SHARED  # when it is not known yet whether there are others
        self._rounds += 1
        while rest:
            others = self.database.foreign > self._foreign
            if others:
                self._foreign = self.database.foreign
                random.Random(os.getpid()).shuffle(rest)
            size = _SHARED if first or others else len(rest)
            first = False
            now, rest = rest[:size], rest[size:]
            if not self._answered(now, tasks, progress, out_of_time):
                return False
            self.database.refresh()
            rest = [job for job in rest if self.database.trial(job.workload, self.device, job.schedule) is None]
        return True

    def _answered(
        self, jobs: list[Job], tasks: Mapping[Workload, _Task], progress: Progress, out_of_time: Callable[[], bool]
    ) -> bool:
        waiting = {(job.workload, job.schedule) for job in jobs}
        with _given_up(self._measurer.measure(jobs)) as timings:
            for timing in timings:
                self.database.add(timing, self.device)
                task = tasks[timing.job.workload]
                task.measured += 1
                _count(task, timing.job.schedule, timing.seconds)
                waiting.discard((timing.job.workload, timing.job.schedule))
                progress.advance(note=task.workload.key)
                if out_of_time():
                    return False
        if waiting:
            raise RuntimeError(f"the measurer gave no answer for {', '.join(sorted(w.key for w, _ in waiting))}")
        return True

    def _ends(self, task: _Task, stopping: Stopping, rates: list[tuple[float, Workload]], progress: Progress) -> bool:
        highest = max((rate for rate, workload in rates if workload != task.workload), default=float("inf"))
        if task.left <= 0:
            reason = "trials"
        elif task.default not in task.known:
            return False  # what the others are compared with, and what a plan begins with
        elif task.stale >= stopping.waits:
            reason = "patience"
        elif (
            task.best_s is not None
            and len(task.known) >= _LEAD
            and _rate(task.workload, task.best_s) >= stopping.attainable * highest
        ):
            reason = "attainable"
        else:
            return False
        self._end(task, reason, progress)
        return True

    def _end(self, task: _Task, reason: str, progress: Progress) -> None:
        task.ended = reason
        if task.left > 0:
            progress.advance(task.left)

    def _outcome(self, task: _Task) -> Outcome:
        trials = self.database.trials(task.workload, self.device)
        broken = [record for record in trials if record.seconds is None]
        default = self.database.trial(task.workload, self.device, task.default)
        return Outcome(
            task.workload,
            None if default is None or default.seconds is None else default,
            self.database.best(task.workload, self.device),
            len(trials),
            len(broken),
            task.measured,
            broken[0].error if broken else "",
            task.ended or "time",
        )

    def _highest_rates(self) -> list[tuple[float, Workload]]:
        """The two highest rates of workloads that were tuned, so that one is left for each to be compared with."""
        rates = []
        for workload in self.database.workloads(self.device):
            trials = self.database.trials(workload, self.device)
            timed = [record.seconds for record in trials if record.seconds is not None]
            if timed and len(trials) >= _LEAD:
                rates.append((_rate(workload, min(timed)), workload))
        return nlargest(2, rates, key=lambda found: found[0])

    def _repeats(self, task: _Task) -> int:
        flops = 2.0 * task.workload.work.macs
        seconds = task.best_s or flops / (_SLOW_FLOPS * self.device.threads) + 1e-6
        return int(min(max(_MEASURING_S / seconds, _FEWEST), _MOST))


def _count(task: _Task, schedule: Schedule, seconds: float | None) -> None:
    """Books a trial of the task's workload, known or new."""
    task.left -= 1
    task.known.add(schedule)
    if seconds is not None and (task.best_s is None or seconds < task.best_s * (1 - _GAIN)):
        task.stale = 0
    elif task.best_s is not None:
        task.stale += 1
    if seconds is not None:
        task.best_s = seconds if task.best_s is None else min(seconds, task.best_s)


def _rate(workload: Workload, seconds: float) -> float:
    return workload.work.macs / seconds


@contextmanager
def _given_up(timings: Iterator[Timing]) -> Iterator[Iterator[Timing]]:
    """What is left of ``timings`` is given up at the end, so that nothing measures on behind the caller's back."""
    try:
        yield timings
    finally:
        close = getattr(timings, "close", None)
        if close is not None:
            close()
