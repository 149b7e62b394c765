"""Spreads tasks over the devices of a key until each has one outcome, whatever becomes of the devices.

A session with a device begins and ends with a look at the reference kernel, and what it measured between the two counts
only when the second look is good: nothing that a lying device says gets out. A task whose device died, hung or lied is
given to another one.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from codegen.farm.address import FarmError
from codegen.farm.lane import Builder, Lane, Outcome, State, Task
from codegen.farm.pool import Pool
from codegen.farm.roster import Look, doubt
from codegen.farm.tracker import status

_CENSUS_S = 1.0
_LOST_S = 3.0
_IDLE_S = 0.5
_LOOK_CALLS = 300
_LOOK_S = 0.03


class Dispatch:
    """One run over ``tasks``."""

    def __init__(self, pool: Pool, tasks: Sequence[Task]) -> None:
        self._pool = pool
        self._to_build = deque(task for task in tasks if task.build is not None)
        self._ready = deque(task for task in tasks if task.build is None)
        self._unanswered = set(tasks)
        self._held: dict[str, list[Outcome]] = {}
        self._held_since: dict[str, float] = {}
        self._outcomes: deque[Outcome] = deque()
        self._devices: frozenset[str] = frozenset()
        self._next_census = 0.0
        self._good_news = time.monotonic()
        self._tracker_trouble: FarmError | None = None

    def run(self) -> Iterator[Outcome]:
        """Outcomes in the order in which they are certain. FarmError, after all that are, where no device is left.

        What is under way when the caller stops is given up.
        """
        try:
            while self._unanswered:
                now = time.monotonic()
                self._census(now)
                self._reclaim(now)
                self._build(now)
                self._staff()
                for lane in self._pool.lanes:
                    self._direct(lane, now)
                yield from self._take()
                if self._unanswered:
                    self._check_hope(time.monotonic())
                    self._listen()
                    yield from self._take()
        finally:
            self._leave()

    def _take(self) -> Iterator[Outcome]:
        while self._outcomes:
            given = time.monotonic()
            yield self._outcomes.popleft()
            # The caller's time is not time in which no device was there.
            self._good_news += time.monotonic() - given

    # What there is to do, and who can do it

    @property
    def _to_come(self) -> int:
        building = sum(builder.task is not None for builder in self._pool.builders)
        return len(self._to_build) + building + len(self._ready)

    def _usable(self, now: float) -> frozenset[str]:
        return frozenset(name for name in self._devices if self._pool.roster.usable(name, now))

    def _census(self, now: float) -> None:
        if now < self._next_census:
            return
        self._next_census = now + _CENSUS_S
        try:
            group = status(self._pool.tracker.host, self._pool.tracker.port).group(self._pool.key)
        except FarmError as error:
            self._tracker_trouble = error
            return
        self._tracker_trouble = None
        self._devices = frozenset(map(str, group.devices))
        self._pool.seen = self._pool.seen or bool(self._devices)
        self._pool.roster.present(self._devices)

    def _reclaim(self, now: float) -> None:
        """Answers that wait for a look at a device that is gone are not waited for."""
        busy = {lane.device for lane in self._pool.lanes if lane.has_session}
        for name in list(self._held):
            if name in busy:
                self._held_since[name] = now
            elif now - self._held_since.get(name, now) > _LOST_S or not self._pool.roster.usable(name, now):
                self._again(name)

    def _check_hope(self, now: float) -> None:
        if any(lane.has_session or lane.state is State.STARTING for lane in self._pool.lanes):
            return
        pool, patience = self._pool, self._pool.rules.patience_s
        if now - self._good_news < (patience if pool.seen else min(patience, 10.0)):
            return
        left = f"{len(self._unanswered)} of the jobs are not measured"
        if self._tracker_trouble is not None:
            raise FarmError(f"{self._tracker_trouble}; {left}")
        known = pool.roster.describe()
        if not known and not self._devices:
            others = status(pool.tracker.host, pool.tracker.port).groups
            keys = ", ".join(f"{group.key} ({len(group.devices)})" for group in others if group.devices)
            raise FarmError(
                f"the tracker at {pool.tracker} has no device of key {pool.key!r}, "
                f"it has {keys or 'none at all'}; {left}"
            )
        where = f"of key {pool.key!r} at {pool.tracker}"
        if busy := ", ".join(sorted(self._usable(now))):
            raise FarmError(f"the devices {where} did not become free in {patience:g} s ({busy}); {left}")
        raise FarmError(f"no device {where} is left, and none came back in {patience:g} s ({known}); {left}")

    # Building

    def _build(self, now: float) -> None:
        pool = self._pool
        ahead = 2 * len(pool.lanes) + pool.most_builders
        for builder in list(pool.builders):
            if builder.task is None and builder.process.ended() is not None:
                self._discard(builder)
        while self._to_build and len(self._ready) < ahead:
            free = [builder for builder in pool.builders if builder.task is None]
            if not free:
                if len(pool.builders) >= pool.most_builders:
                    return
                free = [pool.new_builder()]
                pool.builders += free
            free[0].build(self._to_build.popleft(), pool.rules.build_s)

    def _discard(self, builder: Builder) -> None:
        builder.process.kill()
        self._pool.builders.remove(builder)

    def _hear_builder(self, builder: Builder, now: float) -> None:
        task = builder.task
        if task is None:
            return
        answer = builder.answer()
        if answer is None:
            end = builder.process.ended()
            if end is None and now < builder.deadline:
                return
            end = end or f"took longer than {self._pool.rules.build_s:g} s"
            self._discard(builder)
            self._answer(Outcome(task, None, f"the building process {end}", "the compiler"))
            return
        builder.task = None
        self._good_news = now
        if "error" in answer:
            self._answer(Outcome(task, None, answer["error"], "the compiler"))
        else:
            task.request["time"].update(library=answer["library"], arguments=answer["arguments"])
            self._ready.append(task)

    # Lanes

    def _staff(self) -> None:
        """As many lanes as there are devices and tasks for."""
        pool = self._pool
        needed = self._to_come + sum(lane.task is not None for lane in pool.lanes) or len(self._held)
        self._wanted = min(len(self._usable(time.monotonic())), needed)
        while len(pool.lanes) < self._wanted:
            pool.lanes.append(Lane(pool.kind))

    def _direct(self, lane: Lane, now: float) -> None:
        """Gives a lane that waits for nothing something to do."""
        pool, rules = self._pool, self._pool.rules
        if lane.state is State.IDLE:
            engaged = sum(other.state not in (State.STARTING, State.IDLE, State.CLOSING) for other in pool.lanes)
            if engaged < self._wanted and now >= lane.not_before:
                try:
                    lane.ask(pool.tracker, pool.key)
                except FarmError as error:
                    self._tracker_trouble = error
                    lane.not_before = now + _CENSUS_S
        elif lane.state is State.ASKING and not self._wanted:
            lane.withdraw()
        elif lane.state is State.OPEN:
            task = self._task_for(lane, now) if lane.jobs < rules.jobs else None
            if not pool.roster.usable(lane.device, now):
                self._again(lane.device)
                lane.close()
            elif task is not None:
                self._ready.remove(task)
                lane.work(task)
            elif (
                lane.jobs < rules.jobs
                and self._to_come > len(self._ready)
                and self._leased(lane, rules.deadline_s, now)
            ):
                return  # something is being built
            elif self._held.get(lane.device):
                self._look(lane, _LOOK_CALLS)
            else:
                lane.close()

    def _task_for(self, lane: Lane, now: float) -> Task | None:
        """The first that has not failed here, or has nowhere else to go, and is done before the lease ends."""
        others = self._usable(now) - {lane.device}
        for task in self._ready:
            tried = {name for name, _ in task.tried}
            if self._leased(lane, task.deadline_s, now) and (lane.device not in tried or others <= tried):
                return task
        return None

    def _leased(self, lane: Lane, deadline_s: float, now: float) -> bool:
        return lane.leased_until - now > deadline_s + self._pool.rules.look_s

    def _look(self, lane: Lane, calls: int) -> None:
        assert self._pool.reference is not None
        scale = calls / _LOOK_CALLS
        lane.look(self._pool.reference, calls, _LOOK_S * scale, self._pool.rules.look_s)

    # What they say

    def _listen(self) -> None:
        now = time.monotonic()
        pool = self._pool
        with selectors.DefaultSelector() as selector:
            for builder in pool.builders:
                selector.register(builder, selectors.EVENT_READ, builder)
            for lane in pool.lanes:
                if lane.waits:
                    selector.register(lane, selectors.EVENT_READ, lane)
            until = min([self._next_census, *(lane.deadline for lane in pool.lanes if lane.waits)], default=now)
            selector.select(min(max(until - now, 0.0), _IDLE_S))
        now = time.monotonic()
        for builder in list(pool.builders):
            self._hear_builder(builder, now)
        for lane in pool.lanes:
            if lane.waits:
                self._hear(lane, now)

    def _hear(self, lane: Lane, now: float) -> None:
        if lane.state is State.ASKING:
            self._hear_tracker(lane, now)
            return
        messages = lane.answers()
        if messages:
            self._advance(lane, messages[-1], now)
        elif (end := lane.process.ended()) is not None:
            self._lose(lane, f"its process here {end}", now)
        elif now >= lane.deadline:
            self._lose(lane, f"{_DOING[lane.state]} took longer than {lane.limit_s:g} s", now)

    def _hear_tracker(self, lane: Lane, now: float) -> None:
        try:
            offer = lane.offer()
        except FarmError as error:
            self._tracker_trouble = error
            lane.not_before = now + _CENSUS_S
            return
        if offer is None:
            return
        if self._pool.roster.usable(str(offer.device), now):
            longest = max((task.deadline_s for task in self._unanswered), default=0.0)
            lane.open(offer, max(self._pool.rules.lease_s, longest + 2 * self._pool.rules.look_s))
        # Else nobody comes for this offer; the device makes another one after some seconds.

    def _advance(self, lane: Lane, message: dict[str, Any], now: float) -> None:
        if lane.state is State.STARTING:
            lane.state = State.IDLE
            self._good_news = now
        elif lane.state is State.CLOSING:
            lane.closed()
        elif not message.get("alive", True):
            self._lose(lane, "the session broke off", now)
        elif lane.state is State.OPENING and "error" in message:
            self._lose(lane, f"no session: {message['error']}", now)
        elif lane.state is State.OPENING:
            lane.round_trip_s = message["round_trip_s"]
            self._look(lane, _LOOK_CALLS)
        elif lane.state is State.LOOKING:
            self._looked(lane, message, now)
        else:
            self._worked(lane, message)

    def _looked(self, lane: Lane, message: dict[str, Any], now: float) -> None:
        name, roster = lane.device, self._pool.roster
        if "error" in message:
            self._lose(lane, f"the reference kernel fails: {message['error']}", now)
            return
        look = Look(message["samples"], message["wall_s"], lane.round_trip_s, message["output_error"])
        verdict = roster.judge(name, look, now)
        if verdict is None:
            self._look(lane, 2 * lane.calls)
            return
        doubtful, lane.doubtful = lane.doubtful, None
        if verdict:
            self._pool.tell(f"device {name} is not used: {verdict}")
            if doubtful is not None:
                self._retry(doubtful[0], name, verdict)
            self._again(name)
            lane.close()
            return
        self._good_news = now
        lane.state = State.OPEN
        if doubtful is not None:
            self._answer(Outcome(doubtful[0], None, doubtful[1], name))
        held = self._held.pop(name, [])
        roster.done(name, len(held))
        for outcome in held:
            for other in {failed for failed, _ in outcome.task.tried} - {name}:
                roster.outdone(other, now)
            self._answer(outcome)

    def _worked(self, lane: Lane, message: dict[str, Any]) -> None:
        task, name = lane.task, lane.device
        assert task is not None
        lane.task = None
        lane.jobs += 1
        self._good_news = time.monotonic()
        if reason := doubt(message, self._pool.roster.limits.output_error):
            lane.doubtful = task, reason
            self._look(lane, _LOOK_CALLS)
            return
        lane.state = State.OPEN
        self._held.setdefault(name, []).append(Outcome(task, message, message.get("error", ""), name))
        self._held_since[name] = time.monotonic()

    # Failures

    def _lose(self, lane: Lane, reason: str, now: float) -> None:
        """The session is lost, and its process is not waited for."""
        if lane.state is State.STARTING:
            raise FarmError(f"the process that talks to devices does not start: {reason}; {lane.process.log()[-300:]}")
        name, tasks = lane.device, [lane.task, lane.doubtful[0] if lane.doubtful else None]
        lane.kill()
        lane.start()
        if name:
            self._pool.roster.failed(name, reason, now)
            if not self._pool.roster.usable(name, now):
                self._pool.tell(f"device {name} rests: {reason}")
        for task in filter(None, tasks):
            self._retry(task, name, reason)

    def _retry(self, task: Task, name: str, reason: str) -> None:
        task.tried.append((name, reason))
        if len(task.tried) < self._pool.rules.tries:
            self._pool.retries += 1
            self._ready.appendleft(task)
            return
        tries = "; ".join(f"{device}: {why}" for device, why in task.tried)
        self._answer(Outcome(task, None, f"failed {len(task.tried)} times, {tries}", name))

    def _again(self, name: str) -> None:
        """What a device measured is measured again, on others."""
        for outcome in self._held.pop(name, []):
            self._pool.retries += 1
            self._ready.append(outcome.task)

    def _answer(self, outcome: Outcome) -> None:
        self._unanswered.remove(outcome.task)
        if outcome.task.build is not None:
            for key in ("library", "arguments"):
                if path := outcome.task.request["time"].pop(key, None):
                    Path(path).unlink(missing_ok=True)
        if outcome.error and outcome.answer is not None:
            outcome = replace(outcome, answer=None)
        self._outcomes.append(outcome)

    def _leave(self) -> None:
        """Gives devices back, ends what still works."""
        for lane in self._pool.lanes:
            if lane.state is State.ASKING:
                lane.withdraw()
            elif lane.state is State.TIMING:
                lane.kill()
            elif lane.has_session:
                lane.close()
        self._pool.lanes[:] = [lane for lane in self._pool.lanes if lane.state is not State.TIMING]
        for builder in [builder for builder in self._pool.builders if builder.task is not None]:
            self._discard(builder)


_DOING = {
    State.STARTING: "the start of the process that talks to devices",
    State.OPENING: "opening a session",
    State.LOOKING: "the reference kernel",
    State.TIMING: "a job",
    State.CLOSING: "closing the session",
}
