"""Compiles kernels with numba, with a cache on disk that no edit can make stale.

numba checks the file of the cached function alone, not those of the functions compiled into it; a change to one of
them would leave old prices in the cache. So the kernels of a module have a folder named after the contents of all that
can be compiled into them: the module, this one, and the modules of the package that it imports, directly or not. An
edit anywhere else leaves them as they are.
"""

from __future__ import annotations

import ast
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = Path(__file__).parent


def _imported(source: Path) -> Iterator[Path]:
    """The files of our package that a module's import statements name, wherever in it they stand."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, *inner = name.split(".")
            if package != _PACKAGE.name:
                continue
            path = _PACKAGE.joinpath(*inner)
            yield from (file for file in (path / "__init__.py", path.with_suffix(".py")) if inner and file.is_file())


@cache
def _imports(source: Path) -> tuple[Path, ...]:
    return tuple(_imported(source))


def _sources(module: Path) -> list[Path]:
    """``module``, this file, and all files of the package that they import, directly or not; in order."""
    found: set[Path] = set()
    waiting = {module, Path(__file__)}
    while waiting:
        source = waiting.pop()
        found.add(source)
        waiting |= set(_imports(source)) - found
    return sorted(found)


def _digest(module: Path) -> str:
    """Of everything that can be compiled into a kernel of ``module``."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in _sources(module):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _cache_folder(module: Path) -> Path | None:
    """The first folder that can be written: the user's choice, beside the sources, the user's cache; None if none."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    roots = [Path(chosen)] if chosen else [_PACKAGE / "__pycache__", home / "rankc"]
    for root in roots:
        folder = root / f"numba-{_digest(module)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue  # read-only place: the next one
    return None


def compiled(function: F) -> F:
    """``function`` compiled to machine code on its first call, or read back from the cache; one thread."""
    module = Path(function.__code__.co_filename)
    folder = _cache_folder(module) if module.is_file() else None
    if folder is None:
        return cast(F, numba.njit(function))
    settings: Any = numba.config  # its names come into being at run time
    before = settings.CACHE_DIR
    settings.CACHE_DIR = str(folder)  # read once, while the decorator runs
    try:
        return cast(F, numba.njit(cache=True)(function))
    finally:
        settings.CACHE_DIR = before
