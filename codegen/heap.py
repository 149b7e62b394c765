"""The C library's heap: what is freed stays at hand for what is allocated next."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

HELD_BYTES = 512 << 20
"""Arrays up to this size come from the heap, which keeps at most as much of what is freed at its end."""


def keep_freed_memory() -> bool:
    """Has glibc hold on to freed memory; False where it is another library, or the user has set it up otherwise.

    By default each array of more than 32 MiB comes from the kernel, page by page and filled with zeros, and goes back
    when it is freed. A walk over a network makes hundreds of them, which takes up to a tenth of the time of a run.
    For a program of our own: the setting holds for the whole process.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return False
        return all(library.mallopt(option, HELD_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
    except (OSError, AttributeError, TypeError):  # no C library that can be asked
        return False
