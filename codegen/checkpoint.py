"""Resumable state: named checkpoints of arrays and JSON values, bound to the run that made them.

A checkpoint is an ``.npz`` named after its own digest, and a JSON file that points to it. The JSON file is renamed
into place last, so at every instant either the old or the new checkpoint stands, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from passes.core.mapped import release, spilled
from passes.errors import InputError, UsageError

Array = NDArray[Any]

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_KEY_FILE = "run_key.json"
_MAPPED_BYTES = 32 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder, over its files' names and contents. InputError where it cannot be read."""
    try:
        if path.is_dir():
            state = hashlib.sha256()
            for entry in sorted(p for p in path.rglob("*") if p.is_file()):
                state.update(f"{entry.relative_to(path)} {file_sha256(entry)}\n".encode())
            return state.hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class RunKey:
    """What a state belongs to: options of the run, digests of the files it reads, versions of the tools."""

    options: Mapping[str, Any]
    digests: Mapping[str, str]
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {"options": dict(self.options), "digests": dict(self.digests), "versions": dict(self.versions)}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(_canonical(self.as_dict())).hexdigest()

    def differences(self, stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """In words, what differs from a stored key."""
        found = []
        for section, values in self.as_dict().items():
            before = stored.get(section, {})
            for name in sorted(values.keys() | before.keys()):
                old, new = before.get(name), values.get(name)
                if _canonical(old) == _canonical(new):
                    continue
                said = {
                    "options": f"{name} was {_shown(old)} and is {_shown(new)}",
                    "digests": f"the content of {name} has changed",
                    "versions": f"{name} was version {old} and is {new}",
                }
                found.append(said[section])
        return found


class CheckpointStore:
    """The checkpoints of one run in ``folder``. ``note`` is told of a checkpoint that is damaged."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._note = note

    def bind(self, key: RunKey, *, resume: bool) -> bool:
        """Ties the folder to ``key``; True if earlier checkpoints can be used.

        Without ``resume`` earlier checkpoints are removed. UsageError where ``resume`` meets the state of another run.
        """
        path = self._folder / _KEY_FILE
        found = path.is_file()
        if resume and found:
            try:
                stored = json.loads(path.read_bytes())
                differences = key.differences(stored)
            except (ValueError, AttributeError):
                self._note("the saved state is damaged: the run starts from the beginning")
            else:
                if differences:
                    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
                    raise UsageError(
                        f"--resume: the saved state belongs to another run: {differences[0]}{more}; "
                        "go back to that, or start over with --force"
                    )
                return True
        elif resume:
            self._note("there is no saved state to resume from: the run starts from the beginning")
        elif found:
            self._note("the saved state of an earlier run is dropped; --resume would have gone on from it")
        self.clear()
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, _canonical(key.as_dict()))
        return False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(p.stem for p in self._folder.glob("*.json") if p.name != _KEY_FILE))

    def checkpoint(self, name: str, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
        """Saves ``arrays`` and the JSON value ``meta`` under ``name`` (letters, digits, _ and -)."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a checkpoint")
        partial = self._folder / f"{name}.partial"
        with partial.open("wb") as file:
            _write_archive(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        digest = file_sha256(partial)
        data = self._folder / f"{name}.{digest[:16]}.npz"
        partial.replace(data)
        body = {"data": data.name, "data_sha256": digest, "meta": dict(meta)}
        entry = {**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()}
        _write_atomically(self._folder / f"{name}.json", _canonical(entry))
        for stale in self._folder.glob(f"{name}.*.npz"):
            if stale != data:
                stale.unlink()

    def restore(self, name: str) -> tuple[dict[str, Array], dict[str, Any]] | None:
        """What was saved under ``name``; None where nothing was, or (with a note) where it is damaged."""
        path = self._folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            entry = json.loads(path.read_bytes())
            body = {part: entry[part] for part in ("data", "data_sha256", "meta")}
            if hashlib.sha256(_canonical(body)).hexdigest() != entry["sha256"]:
                raise ValueError("its digest does not fit")
            data = self._folder / Path(body["data"]).name
            if file_sha256(data) != body["data_sha256"]:
                raise ValueError(f"the digest of {data.name} does not fit")
            with data.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {key: _placed(archive[key]) for key in archive.files}, body["meta"]
        except (ValueError, KeyError, TypeError, InputError) as error:
            self._note(f"the checkpoint {name!r} is damaged ({error}): its stage runs again")
            return None

    def clear(self) -> None:
        """Removes every checkpoint."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                path.unlink()


def _write_archive(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    """What np.savez writes, letting go of each mapped array once it is written."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
            release(array)


def _placed(array: Array) -> Array:
    """Large arrays go where they came from, into a file: together they may be more than the memory holds."""
    return spilled(array) if array.nbytes >= _MAPPED_BYTES else array


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
