"""The processes that a measurer steers: lanes, each of which talks to one device at a time, and builders."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from codegen.farm.address import Address
from codegen.farm.process import RUNTIME_ONLY, ChildProcess
from codegen.farm.tracker import Offer, TrackerConnection

START_S = 120.0
_OPEN_S = 20.0
_TRACKER_S = 5.0


@dataclass(eq=False)
class Task:
    """One piece of work for a device. ``build``: what a builder is asked first, None where nothing has to be built.

    ``request``: what the session is asked; a builder's answer is added to it under ``time``. ``tried``: devices on
    which it failed, and why.
    """

    id: int
    build: dict[str, Any] | None
    request: dict[str, Any]
    deadline_s: float
    tried: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """``answer``: what the device said; None where the task failed, with the ``error``. ``where``: the device."""

    task: Task
    answer: dict[str, Any] | None
    error: str = ""
    where: str = ""


class State(Enum):
    STARTING = auto()
    IDLE = auto()
    ASKING = auto()
    OPENING = auto()
    LOOKING = auto()
    OPEN = auto()
    TIMING = auto()
    CLOSING = auto()


class Lane:
    """A session process, and the session it has with a device. ``deadline``: when its answer should be there.

    ``jobs``: those done in this session. ``leased_until``: when the device ends the session by itself. ``doubtful``: a
    task and its answer, which look wrong; a look at the device decides whose fault that is.
    """

    _ids = itertools.count(1)

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._tracker: TrackerConnection | None = None
        self.task: Task | None
        self.doubtful: tuple[Task, str] | None
        self.start()

    def start(self) -> None:
        self.process = ChildProcess("codegen.farm.session_child", self._kind, RUNTIME_ONLY)
        self.state = State.STARTING
        self.limit_s = START_S
        self.deadline = time.monotonic() + START_S
        self.not_before = 0.0
        self._no_session()

    def fileno(self) -> int:
        return self.process.fileno() if self._tracker is None else self._tracker.fileno()

    @property
    def waits(self) -> bool:
        """Something is to be heard from its process or from the tracker."""
        return self.state not in (State.IDLE, State.OPEN)

    @property
    def has_session(self) -> bool:
        return self.state in (State.OPENING, State.LOOKING, State.OPEN, State.TIMING)

    def ask(self, tracker: Address, key: str) -> None:
        """Asks the tracker for a device. FarmError where the tracker is gone."""
        self._tracker = TrackerConnection(tracker, _TRACKER_S)
        self._tracker.request(key)
        self.state, self.deadline = State.ASKING, float("inf")

    def offer(self) -> Offer | None:
        """The device, once the tracker has one; the lane is idle then. FarmError where the tracker is gone."""
        assert self._tracker is not None
        try:
            offer = self._tracker.offer()
        except Exception:
            self.withdraw()
            raise
        if offer is not None:
            self.withdraw()
        return offer

    def withdraw(self) -> None:
        """Takes back what it asked the tracker for."""
        assert self._tracker is not None
        self._tracker.close()
        self._tracker = None
        self.state = State.IDLE

    def open(self, offer: Offer, lease_s: float) -> None:
        self.device = str(offer.device)
        self.leased_until = time.monotonic() + lease_s
        address = offer.device
        request = {"host": address.host, "port": address.port, "match_key": offer.match_key, "lease_s": lease_s}
        self._send({"open": request}, State.OPENING, _OPEN_S)

    def look(self, reference: Mapping[str, Any], calls: int, limit_s: float, deadline_s: float) -> None:
        self.calls = calls
        self._send({"time": {**reference, "calls": calls, "limit_s": limit_s}}, State.LOOKING, deadline_s)

    def work(self, task: Task) -> None:
        self.task = task
        self._send(task.request, State.TIMING, task.deadline_s)

    def close(self) -> None:
        """Gives the device back."""
        self._send({"close": True}, State.CLOSING, _OPEN_S)

    def answers(self) -> list[dict[str, Any]]:
        """What its process has said to what it was asked last."""
        return [message for message in self.process.received() if message.get("id", self._id) == self._id]

    def closed(self) -> None:
        self.state = State.IDLE
        self._no_session()

    def kill(self) -> None:
        if self._tracker is not None:
            self.withdraw()
        self.process.kill()

    def _send(self, message: Mapping[str, Any], state: State, deadline_s: float) -> None:
        self._id = next(self._ids)
        self.process.send({"id": self._id, **message})
        self.state, self.limit_s = state, deadline_s
        self.deadline = time.monotonic() + deadline_s

    def _no_session(self) -> None:
        self._id = 0
        self.device = ""
        self.round_trip_s = 0.0
        self.task = self.doubtful = None
        self.jobs = self.calls = 0
        self.leased_until = 0.0


class Builder:
    """A build process and the task that it works on, with the ``deadline`` of that."""

    def __init__(self, module: str, setup: str) -> None:
        self.process = ChildProcess(module, setup, {"TVM_NUM_THREADS": "1"})
        self.task: Task | None = None
        self.deadline = 0.0
        self._fresh = True

    def fileno(self) -> int:
        return self.process.fileno()

    def build(self, task: Task, limit_s: float) -> None:
        assert task.build is not None
        self.task = task
        self.process.send({"id": task.id, **task.build})
        # The first task also waits until the compiler is loaded.
        self.deadline = time.monotonic() + limit_s + (START_S if self._fresh else 0.0)
        self._fresh = False

    def answer(self) -> dict[str, Any] | None:
        """What became of its task, None where that is not known yet."""
        for message in self.process.received():
            if self.task is not None and message.get("id") == self.task.id:
                return message
        return None

    def wait(self) -> dict[str, Any]:
        """Its answer, or an ``error`` that says why there is none; the process is free then."""
        answer = None
        while answer is None:
            select.select([self], [], [], 0.2)
            answer = self.answer()
            if answer is None and (end := self.process.ended()) is not None:
                answer = {"error": f"the building process {end}"}
            elif answer is None and time.monotonic() > self.deadline:
                answer = {"error": "the building process does not answer"}
        self.task = None
        return answer
