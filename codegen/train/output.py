"""Where a training run writes: results at the top of its folder, the state for ``--resume`` in ``checkpoint``.

Results appear when the run is through, train.json last. ``log.csv`` grows with every epoch.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from passes.errors import InputError, UsageError, first_line
from passes.training.progress import Epoch

CONFIG, LOG, REPORT, MODEL, WEIGHTS, STATE = (
    "config.json",
    "log.csv",
    "train.json",
    "model.onnx",
    "model.pt",
    "checkpoint",
)
_KNOWN = frozenset({CONFIG, LOG, REPORT, MODEL, WEIGHTS, STATE})
_COLUMNS = ("phase", "epoch", "loss", "lr", "held_out", "seconds")


class Output:
    """A run's folder. Only the process that leads has one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recipe: dict[str, Any] = {}
        self._replaced: frozenset[str] = frozenset()  # files of an earlier run, which begin() removes

    @property
    def state(self) -> Path:
        return self.folder / STATE

    @contextmanager
    def opened(self, recipe: dict[str, Any], *, force: bool, resume: bool) -> Iterator[dict[str, Any] | None]:
        """The folder, locked, for a run of ``recipe``; yields the report where such a run is through already.

        UsageError where the folder holds something else, another recipe's state, or anything at all with neither
        ``force`` nor ``resume``; InputError where it cannot be written. What ``force`` replaces stays until
        :meth:`begin`; where the run ends before that, the folder is as it was.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"{self.folder}: another run is writing there; choose another folder") from error
            names = self._check(recipe, force=force, resume=resume)
            self._recipe, self._replaced = recipe, names if force else frozenset()
            done = self._report() if resume and not force else None
            if self._replaced:
                if not os.access(self.folder, os.W_OK):
                    raise InputError(f"{self.folder}: cannot be written: Permission denied")
            elif done is None:
                self._write_config()
                self.state.mkdir(exist_ok=True)
            yield done
        finally:
            if self._aside.is_dir():
                self._aside.rename(self.state)
            os.close(lock)

    @property
    def _aside(self) -> Path:
        return self.folder / f".{STATE}.{os.getpid()}.tmp"

    def set_aside(self) -> None:
        """Takes the state of the run that is replaced out of the new one's way, which would go on from it."""
        if STATE in self._replaced and not self._aside.exists():
            self.state.rename(self._aside)

    def begin(self) -> None:
        """Removes the run that is replaced, once: the new one is about to write its first file."""
        if not self._replaced:
            return
        # config.json is replaced last, so that the folder is a training run's at any moment
        for name in sorted(self._replaced - {CONFIG, STATE}, key=lambda name: name != REPORT):
            (self.folder / name).unlink()
        if STATE in self._replaced:
            shutil.rmtree(self._aside)
        self._write_config()
        self._replaced = frozenset()

    def _check(self, recipe: dict[str, Any], *, force: bool, resume: bool) -> frozenset[str]:
        """What the folder holds, once that is in order."""
        names = {entry.name for entry in self.folder.iterdir()}
        for name in [name for name in names if name.startswith(".") and name.endswith(".tmp")]:
            path = self.folder / name  # of a run that was killed while it wrote
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            names.remove(name)
        if not names:
            return frozenset()
        if not (force or resume):
            raise UsageError(f"{self.folder}: is not empty; --force replaces it, --resume goes on with an earlier run")
        foreign = min(names - _KNOWN, default=None)
        if foreign or CONFIG not in names:
            what = foreign or min(names)
            raise UsageError(f"{self.folder}: holds {what!r}, which is of no training run; choose another folder")
        if force:
            return frozenset(names)
        before = self._read(CONFIG)
        differing = [key for key in {**before, **recipe} if before.get(key) != recipe.get(key)]
        if differing:
            key = differing[0]
            raise UsageError(
                f"{self.folder}: its run had {key} {json.dumps(before.get(key))}, this one has "
                f"{json.dumps(recipe.get(key))}; --resume goes on with the same run, --force starts anew"
            )
        return frozenset(names)

    def _report(self) -> dict[str, Any] | None:
        return self._read(REPORT) if (self.folder / REPORT).is_file() else None

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
        return found

    def _write_config(self) -> None:
        self._write(CONFIG, json.dumps(self._recipe, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        with self.placed(name) as path:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def placed(self, name: str) -> Iterator[Path]:
        """A file that appears under ``name`` when it is whole."""
        temporary = self.state.parent / f".{name}.{os.getpid()}.tmp"
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
        except OSError as error:
            raise InputError(f"{self.folder / name}: cannot be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def log(self, rows: Iterable[tuple[str, Epoch]]) -> None:
        """Writes log.csv: an epoch a row, all of them each time, so that a resumed run's are whole."""
        with self.placed(LOG) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            for phase, e in rows:
                held = "" if e.held_out is None else e.held_out
                writer.writerow((phase, e.number + 1, e.loss, e.lr, held, round(e.seconds, 3)))

    def finish(self, report: str) -> None:
        """Writes the report and drops the state."""
        self._write(REPORT, report)
        shutil.rmtree(self.state, ignore_errors=True)

    def can_resume(self) -> bool:
        """True where an interrupted run left a checkpoint."""
        return any(self.state.glob("*/training.pt"))
