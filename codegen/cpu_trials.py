"""The trials of one run: those that the database has, and more of them as prices are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from codegen.cpu_device import runs_here
from codegen.events import Events
from codegen.farm.address import Address
from codegen.farm.measurer import FarmMeasurer
from codegen.space import cores
from codegen.tune.database import Database
from codegen.tune.device import Device
from codegen.tune.measuring import Measurer
from codegen.tune.options import TuningOptions
from codegen.tune.proposals import Proposer
from codegen.tune.tuner import Stopping, Tuner
from codegen.tune.workload import Workload

_ENOUGH = 4
"""Trials after which a workload counts as tuned: it may have been ended early because it runs as fast as can be."""


@dataclass(frozen=True)
class Tally:
    """``made`` trials in this run, ``failed`` of them; ``tuned``: the workloads that they were of."""

    made: int
    failed: int
    tuned: frozenset[Workload]


class DeviceTrials:
    """:class:`codegen.cpu_latency.Trials` of ``device`` in the database that ``open_database`` opens when it is needed.

    ``measurer`` is called when the first trial is to be made, None where nothing can be measured. ``thorough``: a
    workload that has fewer trials than ``stopping`` asks for is taken up again; otherwise one that was tuned before
    stays as it is.
    """

    def __init__(
        self,
        open_database: Callable[[], Database],
        device: Device,
        measurer: Callable[[], Measurer] | None,
        proposer: Proposer,
        stopping: Stopping,
        *,
        thorough: bool = False,
    ) -> None:
        self.device = device
        self._open_database = open_database
        self._make_measurer, self._proposer, self._stopping = measurer, proposer, stopping
        self._measurer: Measurer | None = None
        self._enough = stopping.trials if thorough else min(_ENOUGH, stopping.trials)
        self._asked: set[Workload] = set()
        self._tuned: set[Workload] = set()
        self._made, self._failed = 0, 0

    @cached_property
    def database(self) -> Database:
        """InputError where it cannot be used."""
        return self._open_database()

    def best_s(self, workload: Workload) -> float | None:
        best = self.database.best(workload, self.device)
        return None if best is None else best.seconds

    def measured(self) -> Mapping[Workload, float]:
        found = {workload: self.best_s(workload) for workload in self.database.workloads(self.device)}
        return {workload: seconds for workload, seconds in found.items() if seconds is not None}

    def wanting(self, workloads: Sequence[Workload]) -> list[Workload]:
        if self._make_measurer is None:
            return []
        few = (w for w in dict.fromkeys(workloads) if len(self.database.known(w, self.device)) < self._enough)
        return [workload for workload in few if workload not in self._asked]

    def make(
        self, workloads: Sequence[Workload], events: Events, out_of_time: Callable[[], bool] = lambda: False
    ) -> int:
        if self._make_measurer is None or not workloads:
            return 0
        tuner = Tuner(self.database, self._started(self._make_measurer, events), self._proposer)
        summary = tuner.tune(workloads, self._stopping, events, out_of_time)
        self._asked.update(outcome.workload for outcome in summary.outcomes if outcome.ended != "time")
        self._tuned.update(o.workload for o in summary.outcomes if o.measured)
        self._made += summary.measured
        self._failed += sum(min(outcome.broken, outcome.measured) for outcome in summary.outcomes)
        return summary.measured

    def farm(self, events: Events) -> FarmMeasurer | None:
        """The farm that trials are made on, on which whole networks are to be timed too; None where there is none."""
        if self._make_measurer is None:
            return None
        measurer = self._started(self._make_measurer, events)
        return measurer if isinstance(measurer, FarmMeasurer) else None

    def close(self) -> None:
        """Ends the measuring processes; a later trial starts them anew."""
        if self._measurer is not None:
            self._measurer.close()
            self._measurer = None

    def _started(self, make: Callable[[], Measurer], events: Events) -> Measurer:
        if self._measurer is None:
            self._measurer = make()
            if isinstance(self._measurer, FarmMeasurer):
                self._measurer.watch(events.warning)
        return self._measurer

    @property
    def tally(self) -> Tally:
        """Of what was measured so far."""
        return Tally(self._made, self._failed, frozenset(self._tuned))


def measurer_of(device: Device, options: TuningOptions) -> Callable[[], Measurer] | None:
    """Makes what measures on the device; None where nothing can: another processor's code, and no farm."""
    if options.rpc is not None and options.rpc_key is not None:
        return partial(_farm, device, options.rpc, options.rpc_key)
    return partial(_here, device) if runs_here(device) else None


def _here(device: Device) -> Measurer:
    """One kernel at a time, and where there are cores to spare another one is built meanwhile."""
    from codegen.tune.worker import LocalMeasurer

    return LocalMeasurer(device, processes=2 if cores() > device.threads else 1)


def _farm(device: Device, tracker: str, key: str) -> Measurer:
    address = Address.parse(tracker)
    return FarmMeasurer(address.host, address.port, key, device)
