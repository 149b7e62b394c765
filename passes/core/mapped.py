"""Arrays that lie in files: for what the memory may not hold."""

from __future__ import annotations

import mmap
import tempfile
from typing import Any

import numpy as np

from passes.core.site import Array

CHUNK_BYTES = 16 << 20


def spilled(array: Array, dtype: Any = None) -> Array:
    """A copy in an unnamed temporary file, mapped; ``dtype`` converts on the way."""
    dtype = np.dtype(dtype or array.dtype)
    out = unwritten(array.shape, dtype)
    flat, target = array.reshape(-1), out.reshape(-1)
    step = CHUNK_BYTES // dtype.itemsize
    for start in range(0, flat.size, step):
        target[start : start + step] = flat[start : start + step]
        release(out)
        release(array)
    return out


def unwritten(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros in an unnamed temporary file, mapped, to be written to."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape))
    if size == 0:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="rankc-") as file:
        file.truncate(size * dtype.itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)


def release(array: Array) -> None:
    """Lets the system drop the pages of a memory-mapped array; they are read again when needed."""
    mapped = _map(array)
    if mapped is not None and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def is_mapped(array: Array) -> bool:
    """True for an array, or a view of one, that lies in a file."""
    return _map(array) is not None


def _map(array: Array) -> mmap.mmap | None:
    base: Any = array
    while base is not None and not isinstance(base, np.memmap):
        base = getattr(base, "base", None)
    mapped = getattr(base, "_mmap", None)
    return mapped if isinstance(mapped, mmap.mmap) else None
