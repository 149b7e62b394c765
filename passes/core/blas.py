"""How many threads matrix routines take: many threads on small matrices cost more than they bring."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

WIDE = 1200
"""From matrices of this size on, all cores help."""


@cache
def _controller() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  it brings a BLAS of its own, which must be loaded to be controlled

    return ThreadpoolController()


def blas_threads(width: int) -> AbstractContextManager[Any]:
    """A context in which matrices of ``width`` are worked on with one thread, or with all when they are wide."""
    limits = (os.cpu_count() or 1) if width >= WIDE else 1
    context: AbstractContextManager[Any] = _controller().limit(limits=limits, user_api="blas")
    return context
