"""Reads data from .npz, .npy, folders of them and loader scripts into named arrays. Nothing is ever unpickled."""

from __future__ import annotations

import runpy
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.errors import InputError, first_line

Array = NDArray[Any]

LABELS = "labels"
_UNNAMED = frozenset({"x", "arr_0"})
_BROKEN_FILE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
)
"""What NumPy and zipfile raise on truncated, flipped, encrypted and pickled content."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some samples as they were found: input name (or "labels") -> array. ``where`` names the place in messages.

    ``one_sample``: the arrays may lack their leading axis, because one file holds one sample.
    """

    where: str
    arrays: dict[str, Array]
    one_sample: bool = False


def split_source(source: str) -> tuple[Path, str | None]:
    """``script.py:function`` as (path, function); the function is None where it is not given."""
    head, colon, tail = source.rpartition(":")
    if colon and head.endswith(".py"):
        return Path(head), tail
    return Path(source), None


def pieces(source: str, names: Sequence[str]) -> Iterator[Piece]:
    """The pieces that ``source`` holds, in order and one at a time; ``names`` are the network's inputs."""
    path, function = split_source(source)
    if path.suffix == ".py":
        yield from _script(path, function or "load_data")
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder")
    elif path.is_dir():
        yield from _folder(path, names)
    elif path.suffix == ".npz":
        yield Piece(str(path), _npz(path, names))
    elif path.suffix == ".npy":
        yield Piece(str(path), {_only(names, path): _npy(path)})
    else:
        raise InputError(f"{path}: data comes as .npz, .npy, a folder of them or script.py[:function]")


def _npy(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _BROKEN_FILE as error:
        raise InputError(f"{path}: not a readable .npy file: {_reason(error)}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: not a readable .npy file: its content is an archive")
    return array


def _npz(path: Path, names: Sequence[str]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    key = ""
    try:
        # Opened here: np.load leaves a file open that turns out not to be an archive.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: not a readable .npz file: its content is a single array")
            for key in archive.files:
                arrays[key] = archive[key]
    except _BROKEN_FILE as error:
        at = f"{key!r} cannot be read" if key else "not a readable .npz file"
        raise InputError(f"{path}: {at}: {_reason(error)}") from error
    return _name_unnamed(arrays, names)


def _name_unnamed(arrays: dict[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """A network of one input also takes an array called x or arr_0, as np.savez names it."""
    data = [key for key in arrays if key != LABELS]
    if len(names) == 1 and len(data) == 1 and data[0] in _UNNAMED:
        return {names[0] if key == data[0] else key: array for key, array in arrays.items()}
    return arrays


def _folder(path: Path, names: Sequence[str]) -> Iterator[Piece]:
    archives, arrays = sorted(path.glob("*.npz")), sorted(path.glob("*.npy"))
    if not archives and not arrays:
        raise InputError(f"{path}: holds neither .npz nor .npy files")
    if archives and arrays:
        raise InputError(f"{path}: holds both .npz and .npy files; keep one kind")
    for archive in archives:
        yield Piece(str(archive), _npz(archive, names))
    if archives:
        return
    by_name = {array.stem: array for array in arrays}
    if set(by_name) & set(names):
        yield Piece(str(path), {name: _npy(array) for name, array in by_name.items()})
        return
    labels = by_name.pop(LABELS, None)
    only = _only(names, path)
    if labels is not None:
        yield Piece(str(labels), {LABELS: _npy(labels)})
    for array in by_name.values():
        yield Piece(str(array), {only: _npy(array)}, one_sample=True)


def _only(names: Sequence[str], path: Path) -> str:
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"{path}: bare .npy data serves networks of one input, this one has {', '.join(names)}; "
        "use .npz with these names as keys"
    )


def _script(path: Path, function: str) -> Iterator[Piece]:
    load = script_function(path, function)
    if load is None:
        raise InputError(f"{path}: defines no function {function}(); name it as {path.name}:FUNCTION")
    where = f"{path}:{function}"
    with _importing_from(path):
        made = load()
        with _blamed_on(where):
            items = iter(made)
        for number in range(sys.maxsize):
            with _blamed_on(f"{where}, item {number}"):
                item = next(items, None)
            if item is None:
                return
            yield Piece(f"{where}, item {number}", _arrays(item, f"{where}, item {number}"))


def script_function(path: Path, function: str) -> Callable[..., Any] | None:
    """The function of that name in a user's script; None where the script defines none.

    Whatever the script raises, then or when the function is called, is an InputError of one line that names it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such script")
    with _importing_from(path), _blamed_on(str(path)):
        found = runpy.run_path(str(path), run_name="rankc_data").get(function)
    if not callable(found):
        return None

    def called(*arguments: Any) -> Any:
        with _importing_from(path), _blamed_on(f"{path}:{function}"):
            return found(*arguments)

    return called


@contextmanager
def _importing_from(path: Path) -> Iterator[None]:
    """The script's own imports are found meanwhile, as if it had been started."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


class _blamed_on:
    """Turns whatever a user's script raises into one line that names the script."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and isinstance(error, Exception | SystemExit):
            raise InputError(f"{self.where}: raised {type(error).__name__}: {_reason(error)}") from error


def _arrays(item: object, where: str) -> dict[str, Array]:
    if not isinstance(item, Mapping):
        raise InputError(f"{where}: is a {type(item).__name__}, expected a dict of arrays by input name")
    with _blamed_on(where):
        return {str(name): np.asarray(value) for name, value in item.items()}


def _reason(error: BaseException) -> str:
    if "pickle" in str(error).lower() or "Python objects" in str(error):
        return "it is no NumPy array file, or holds Python objects, which are never unpickled"
    return first_line(error)
