"""How many bytes move: against runs that are listed one by one."""

from __future__ import annotations

from math import ceil

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.engine.dma import moved_bytes

Transfer = tuple[int, tuple[int, int, int], tuple[int, int, int], int]


def listed(requests: list[list[Transfer]], burst: int) -> list[int]:
    """The rule of the instruction set, run by run: bytes of each request."""
    totals = []
    for request in requests:
        pieces: list[list[int]] = []  # first byte, and the one behind the last
        for run, counts, strides, address in request:
            for i in np.ndindex(*counts):
                begin = address + sum(a * s for a, s in zip(i, strides, strict=True))
                if not run:
                    continue
                if pieces and pieces[-1][1] == begin:
                    pieces[-1][1] += run
                else:
                    pieces.append([begin, begin + run])
        totals.append(sum(ceil((end - begin) / burst) * burst for begin, end in pieces))
    return totals


@st.composite
def transfer(draw: st.DrawFn) -> Transfer:
    """Strides that often continue what lies inside, addresses that often continue the transfer before."""
    run = draw(st.integers(0, 9))
    counts = tuple(draw(st.sampled_from([0, 1, 1, 2, 3])) for _ in range(3))
    strides: list[int] = []
    reach = 0
    for times in reversed(counts):
        strides.insert(0, draw(st.sampled_from([run + reach, run, 0, run + reach + 5, 11])))
        reach += max(times - 1, 0) * strides[0]
    return run, (counts[0], counts[1], counts[2]), (strides[0], strides[1], strides[2]), draw(st.integers(0, 3))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.lists(transfer(), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 16))
def test_bytes_of_requests(drawn: list[list[Transfer]], burst: int) -> None:
    requests, rows, chained = [], [], []
    for request in drawn:
        end, own = 0, []
        for at, (run, counts, strides, skip) in enumerate(request):
            address = end if skip == 0 else end + skip * 7
            reach = sum(max(c - 1, 0) * s for c, s in zip(counts, strides, strict=True))
            if run and min(counts):
                end = address + reach + run
            own.append((run, counts, strides, address))
            rows.append((address, run, *counts, *strides))
            chained.append(int(at > 0))
        requests.append(own)
    moved = moved_bytes(np.array(rows, np.int64), np.array(chained, np.int64), burst)
    firsts = np.flatnonzero(np.array(chained) == 0)
    assert np.add.reduceat(moved, firsts).tolist() == listed(requests, burst)
