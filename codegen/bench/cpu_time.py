"""How long something takes in CPU time of this process: warm, repeated, with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

_LEAST_S = 0.05
"""A sample lasts at least this long, far above the clock's resolution."""


@dataclass(frozen=True)
class CpuTime:
    """Seconds of one call: the median of the samples, the fastest and the slowest."""

    median_s: float
    low_s: float
    high_s: float


def cpu_time(call: Callable[[], object], repeats: int) -> CpuTime:
    """CPU time of ``call``, from ``repeats`` samples of as many calls as fill one; a first call warms up."""
    call()
    calls = 1
    while (spent := _spent(call, calls)) < _LEAST_S:
        calls = max(2 * calls, int(calls * _LEAST_S / max(spent, 1e-6)))
    samples = [_spent(call, calls) / calls for _ in range(repeats)]
    return CpuTime(median(samples), min(samples), max(samples))


def _spent(call: Callable[[], object], calls: int) -> float:
    begin = time.process_time()
    for _ in range(calls):
        call()
    return time.process_time() - begin
