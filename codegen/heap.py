"""Memory of a whole process: what is freed stays at hand, and cycles of objects are looked for less often."""

from __future__ import annotations

import ctypes
import gc
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h

HELD_BYTES = 512 << 20
"""Arrays up to this size come from the heap, which keeps at most as much of what is freed at its end."""


def keep_freed_memory() -> bool:
    """Has glibc hold on to freed memory; False where it is another library, or the user has set it up otherwise.

    By default each array of more than 32 MiB comes from the kernel, page by page and filled with zeros, and goes back
    when it is freed. A walk over a network makes hundreds of them, which takes up to a tenth of the time of a run. For
    the same reason all threads share one heap: others are given back as soon as they are empty.
    For a program of our own: the setting holds for the whole process.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return False
        options = {_M_MMAP_THRESHOLD: HELD_BYTES, _M_TRIM_THRESHOLD: HELD_BYTES, _M_ARENA_MAX: 1}
        return all(library.mallopt(option, value) == 1 for option, value in options.items())
    except (OSError, AttributeError, TypeError):  # no C library that can be asked
        return False


def collect_seldom() -> None:
    """Has Python look for cycles among its objects after 50,000 new ones, where it does after 700 by default.

    The imports of torch, TVM and numba leave hundreds of thousands of objects that are no garbage; going through them
    over and over takes a tenth of the time of the imports. For a program of our own, before it imports them. Older
    objects are looked through after ten times as many, as always.
    """
    gc.set_threshold(50_000)
