"""Where a run writes: a staging folder beside the output, moved into place whole or not at all.

Beside ``out`` stands ``.out.rankc`` while a run is on, with a lock, the state for ``--resume`` and the staging folder.
It goes away with success. An interrupted run leaves it, and nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from codegen.checkpoint import CheckpointStore, RunKey
from codegen.events import Events, QuietEvents
from passes.errors import InputError, RankcError, UsageError

RESULT_FILES = frozenset(
    {
        "model.onnx",
        "model.onnx.data",
        "model.so",
        "program.bin",
        "program.lst",
        "plan.json",
        "report.json",
        "report.html",
        "layers.csv",
        "config.toml",
    }
)
"""What a finished run may leave at the top of its folder; its report names the rest under ``artifacts``."""

_LOCK, _STATE, _STAGING, _REPLACED, _TRAINING = "lock", "state", "staging", "replaced", "training"


def check_output(output: Path, *, force: bool = False, resume: bool = False) -> None:
    """Refuses an output folder before any work is done, and creates nothing.

    UsageError: it is a file, it is not empty and neither ``force`` nor ``resume`` is given, or it holds something that
    no run of rankc wrote (which replacing it would destroy). InputError: it cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file, -o takes a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (force or resume):
            raise UsageError(f"{output}: is not empty; --force replaces it, --resume goes on with an interrupted run")
        foreign = _foreign(output)
        if foreign:
            raise UsageError(f"{output}: holds {foreign!r}, which is no result of rankc; choose another folder")
    ancestor = output.absolute().parent
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise InputError(f"{output}: cannot be created: {ancestor} is no folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise InputError(f"{output}: cannot be created: {ancestor} is not writable")


def can_resume(output: Path) -> bool:
    """True if an interrupted run left checkpoints for ``output``."""
    state = _folder(output.absolute()) / _STATE
    return bool(CheckpointStore(state, lambda _: None).names)


def _folder(output: Path) -> Path:
    return output.parent / f".{output.name}.rankc"


def _foreign(output: Path) -> str | None:
    """An entry of ``output`` that is no part of a result, or None."""
    names = {entry.name for entry in output.iterdir()}
    known = set(RESULT_FILES)
    try:
        artifacts = json.loads((output / "report.json").read_bytes())["artifacts"]
        known |= {Path(path).parts[0] for path in artifacts.values() if path}
        # --dump-ir may have written into the output as well.
        dump = tomllib.loads((output / "config.toml").read_text(encoding="utf-8")).get("dump_ir")
        known |= set() if dump is None else {Path(dump).parts[0]} - {os.pardir, os.sep}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return min(names)  # without a readable report and configuration this is nobody's result
    return min(names - known, default=None)


class Workspace:
    """Context of one run. Files go to ``staging``; :meth:`commit` makes them the output.

    Leaving it with a RankcError, or before the first checkpoint, leaves nothing behind; leaving it in any other way
    without a commit keeps the checkpoints for ``--resume``. Once training has begun, an error other than a UsageError
    keeps them too: a full disk or a worker that died must not cost what was trained.
    """

    def __init__(
        self,
        output: Path,
        key: RunKey,
        *,
        force: bool = False,
        resume: bool = False,
        events: Events | None = None,
    ) -> None:
        self.output = output.absolute()
        self.folder = _folder(self.output)
        self.staging = self.folder / _STAGING
        self.training = self.folder / _TRAINING  # for the checkpoints of training, which are files of its own kind
        self._key, self._force, self._resume = key, force, resume
        self._events = events or QuietEvents()
        self._store = CheckpointStore(self.folder / _STATE, self._events.note)
        self._lock: int | None = None
        self._created: list[Path] = []

    def __enter__(self) -> Workspace:
        check_output(self.output, force=self._force, resume=self._resume)
        with _writing(self.output):
            self._make_parents()
            self._lock = _locked(self.folder, self.output)
        try:
            with _writing(self.output):
                self._put_back_replaced()
                if not self._store.bind(self._key, resume=self._resume):
                    shutil.rmtree(self.training, ignore_errors=True)
                shutil.rmtree(self.staging, ignore_errors=True)
                self.staging.mkdir()
        except BaseException:
            self._leave(keep=bool(self._store.names))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = UsageError if self.training.is_dir() else RankcError
        interrupted = error is not None and not isinstance(error, kept)
        self._leave(keep=interrupted and bool(self._store.names))

    def place(self, path: Path) -> Path:
        """Where to write something that is to end up at ``path``: inside ``staging`` if it lies in the output."""
        full = path.absolute()
        return self.staging / full.relative_to(self.output) if full.is_relative_to(self.output) else full

    def checkpoint(self, name: str, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """Saves the result of a stage, so that ``--resume`` need not repeat it; ``meta`` is a JSON object."""
        with _writing(self.folder):
            self._store.checkpoint(name, arrays, meta)

    def restore(self, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """The arrays and the JSON object of an earlier :meth:`checkpoint`, or None."""
        return self._store.restore(name)

    def training_of(self, plan: str) -> Path:
        """The folder for the training checkpoint of a plan. From here on an error keeps what there is."""
        folder = self.training / plan
        with _writing(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self) -> None:
        """Makes ``staging`` the output, in one step, and drops the state."""
        with _writing(self.output), _signals_held():
            _flush(self.staging)
            if self.output.exists():
                _exchange(self.staging, self.output, self.folder / _REPLACED)
            else:
                self.staging.rename(self.output)
            self._store.clear()
            self._created.clear()

    def _make_parents(self) -> None:
        missing = [p for p in (self.output.parent, *self.output.parent.parents) if not p.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._created.append(parent)

    def _put_back_replaced(self) -> None:
        """Undoes a replacement that was killed between its two renames."""
        replaced = self.folder / _REPLACED
        if replaced.exists() and not self.output.exists():
            replaced.rename(self.output)
        shutil.rmtree(replaced, ignore_errors=True)

    def _leave(self, *, keep: bool) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        if not keep:
            shutil.rmtree(self.folder / _REPLACED, ignore_errors=True)
            shutil.rmtree(self.folder / _STATE, ignore_errors=True)
            shutil.rmtree(self.training, ignore_errors=True)
            (self.folder / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # another run has just entered it
                self.folder.rmdir()
            for parent in reversed(self._created):
                with suppress(OSError):  # somebody else uses it by now
                    parent.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(folder: Path, output: Path) -> int:
    """An open, locked descriptor. The lock file may be deleted by its last holder: then it is taken anew."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if not folder.parent.is_dir():
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(f"{output}: another run is writing there; wait for it or choose another folder") from error
        except FileNotFoundError:
            pass
        os.close(descriptor)


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    """A full or read-only disk is nobody's bug: one line and exit 4."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{where}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C during the final renames waits until they are done."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(new: Path, old: Path, aside: Path) -> None:
    """Puts ``new`` where ``old`` stands; ``old`` ends up at ``aside``. Atomic where the file system can do it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            new.rename(aside)
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code))
    # Two renames; a run killed between them is put right by the next one (Workspace._put_back_replaced).
    old.rename(aside)
    new.rename(old)
