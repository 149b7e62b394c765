"""Trials in one file, shared by any number of processes; see :mod:`codegen.tune.journal` for what that takes."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from codegen.tune.device import Device
from codegen.tune.journal import Journal
from codegen.tune.measuring import Timing
from codegen.tune.record import Record, from_line, to_line
from codegen.tune.schedule import Schedule
from codegen.tune.similarity import distance, family
from codegen.tune.versions import versions_key
from codegen.tune.workload import Workload
from passes.errors import InputError


def default_path() -> Path:
    """``rankc/tune.jsonl`` in the user's cache folder (XDG base directory specification)."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "rankc" / "tune.jsonl"


class Database:
    """The trials in ``path``, which need not exist before the first :meth:`add`.

    Queries answer for ``versions`` alone: trials of kernels that other code built are kept in the file and not used.
    They see what this object has read; :meth:`add` and :meth:`refresh` read what other processes have added.
    ``warn`` is told in a sentence of everything that is damaged: a record whose checksum does not fit is skipped.
    Raises InputError where the file is no database, is of another schema, or cannot be read or written. Threads may
    share it.
    """

    def __init__(self, path: Path, versions: str | None = None, *, warn: Callable[[str], None] = warnings.warn) -> None:
        self.path = path
        self.versions = versions_key() if versions is None else versions
        self._warn = warn
        self._journal = Journal(path, warn)
        self._guard = threading.RLock()
        self._read = 0
        self._forget()
        self.refresh()

    @property
    def foreign(self) -> int:
        """How many records were read that this object did not write: it grows while others write."""
        return self._read

    def refresh(self) -> int:
        """Reads what was added to the file since; returns how many records that is."""
        with self._guard:
            if self._journal.unchanged:
                return 0
            before = self._count
            with self._journal.locked(write=False):
                self._catch_up()
            return self._count - before

    def add(self, timing: Timing, device: Device) -> Record:
        """Appends a trial; it is on the disk when this returns."""
        record = Record.of(timing, device.key, self.versions, time.time())
        with self._guard, self._journal.locked(write=True):
            self._catch_up()
            self._append([record])
            self._take(record)
        return record

    def merge(self, others: Sequence[Path]) -> int:
        """Takes over the trials of other databases, of all devices and versions, in one piece; returns how many.

        A schedule that is known here is taken over where it was faster there.
        """
        found: list[Record] = []
        for path in others:
            if not path.is_file():
                raise InputError(f"{path}: no such file")
            found += Database(path, self.versions, warn=self._warn).records()
        with self._guard, self._journal.locked(write=True):
            self._catch_up()
            new = [record for record in found if self._take(record)]
            self._append(new)
        return len(new)

    def compact(self, keep: int) -> int:
        """Rewrites the file with the ``keep`` fastest trials of each workload on each device; returns how many go.

        Broken trials stay, so that none is tried again. A trial that goes may be measured again in a later run.
        """
        if keep < 1:
            raise ValueError(f"cannot keep {keep} trials of a workload")
        with self._guard:
            self.refresh()
            if not self.path.exists():
                return 0
            with self._journal.locked(write=True):
                self._catch_up()
                kept: list[Record] = []
                for trials in self._index.values():
                    timed = sorted((r for r in trials.values() if r.seconds is not None), key=_seconds)
                    kept += [*timed[:keep], *(r for r in trials.values() if r.seconds is None)]
                kept.sort(key=lambda record: record.time)
                dropped = self._count - len(kept)
                self._journal.replace(b"".join(map(to_line, kept)))
            self.refresh()
            return dropped

    def best(self, workload: Workload, device: Device) -> Record | None:
        """The fastest trial; None where there is none that worked."""
        timed = [record for record in self.trials(workload, device) if record.seconds is not None]
        return min(timed, key=_seconds, default=None)

    def trial(self, workload: Workload, device: Device, schedule: Schedule) -> Record | None:
        """The trial of one schedule, worked or broken; None where it was not tried."""
        with self._guard:
            return self._index.get((workload.key, device.key, self.versions), {}).get(schedule)

    def trials(self, workload: Workload, device: Device) -> list[Record]:
        """One record per schedule, in the order in which the schedules were first tried.

        Of a schedule that was measured more than once it is the fastest, and a broken one only if none worked.
        """
        with self._guard:
            return list(self._index.get((workload.key, device.key, self.versions), {}).values())

    def known(self, workload: Workload, device: Device) -> frozenset[Schedule]:
        """Every schedule that was tried, broken ones included."""
        return frozenset(record.schedule for record in self.trials(workload, device))

    def workloads(self, device: Device) -> list[Workload]:
        """Those that were tried on the device, sorted by key."""
        with self._guard:
            found = {key[0] for key in self._index if key[1:] == (device.key, self.versions)}
        return [Workload.parse(key) for key in sorted(found)]

    def schedules(self, device: Device) -> dict[str, Schedule]:
        """The fastest known schedule of every workload's key that has one: what kernels are built with."""
        best = (self.best(workload, device) for workload in self.workloads(device))
        return {record.workload: record.schedule for record in best if record is not None}

    def nearest(self, workload: Workload, device: Device, count: int = 1) -> list[Record]:
        """The best trials of the ``count`` most similar workloads of the same family, the most similar first.

        Similar: least sum of the logarithms by which the sizes differ; see :mod:`codegen.tune.similarity`.
        """
        with self._guard:
            kin = self._families.get((family(workload), device.key, self.versions), set()) - {workload}
        nearby = sorted(kin, key=lambda other: (distance(workload, other), other.key))
        found: list[Record] = []
        for other in nearby:
            record = self.best(other, device)
            if record is not None:
                found.append(record)
            if len(found) == count:
                break
        return found

    def records(self) -> list[Record]:
        """Every schedule's record in the file, those of other devices and versions too."""
        with self._guard:
            return [record for trials in self._index.values() for record in trials.values()]

    def _forget(self) -> None:
        self._index: dict[tuple[str, str, str], dict[Schedule, Record]] = {}
        self._families: dict[tuple[str, str, str], set[Workload]] = {}
        self._count = 0  # records of the file, several of one schedule included

    def _catch_up(self) -> None:
        if self._journal.fresh():
            self._forget()
        for line in self._journal.unread():
            try:
                record = from_line(line)
            except ValueError as error:
                self._warn(f"{self.path}: line {self._journal.lines} is damaged and was skipped: {error}")
                continue
            self._count += 1
            self._read += 1
            self._take(record)

    def _append(self, records: Sequence[Record]) -> None:
        if records:
            self._journal.append(b"".join(map(to_line, records)))
            self._count += len(records)

    def _take(self, record: Record) -> bool:
        """Files the record; True where nothing as good was known of its schedule."""
        trials = self._index.setdefault(record.key, {})
        before = trials.get(record.schedule)
        if before is not None and _seconds(before) <= _seconds(record):
            return False
        trials[record.schedule] = record
        workload = Workload.parse(record.workload)
        self._families.setdefault((family(workload), *record.key[1:]), set()).add(workload)
        return True


def _seconds(record: Record) -> float:
    return float("inf") if record.seconds is None else record.seconds
