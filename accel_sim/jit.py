"""Compiles the kernels of the price list with numba, with a cache on disk that no edit can make stale.

numba checks the file of the cached function alone, not those of the functions compiled into it; a change to one of
them would leave old prices in the cache. So the cache lives in a folder named after the contents of all the sources.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = Path(__file__).parent


def _sources_digest() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path | None:
    """The first folder that can be written: the user's choice, beside the sources, the user's cache; None if none."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    roots = [Path(chosen)] if chosen else [_PACKAGE / "__pycache__", home / "rankc"]
    for root in roots:
        folder = root / f"numba-{_sources_digest()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue  # read-only place: the next one
    return None


_FOLDER = _cache_folder()


def compiled(function: F) -> F:
    """``function`` compiled to machine code on its first call, or read back from the cache; one thread."""
    if _FOLDER is None:
        return cast(F, numba.njit(function))
    settings: Any = numba.config  # its names come into being at run time
    before = settings.CACHE_DIR
    settings.CACHE_DIR = str(_FOLDER)  # read once, while the decorator runs
    try:
        return cast(F, numba.njit(cache=True)(function))
    finally:
        settings.CACHE_DIR = before
