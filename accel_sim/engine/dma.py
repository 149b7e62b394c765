"""Transfers over the channel: the pieces that they move in, in whole bursts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled
from accel_sim.pricing.tiling import burst_bytes

ADDRESS, RUN, COUNT, STRIDE = 0, 1, 2, 5
"""Columns of a transfer: DRAM address, run, three counts and three strides, outermost first."""


@compiled
def _repeat(
    whole: bool, head: int, inside: int, tail: int, times: int, joined: bool, burst: int
) -> tuple[bool, int, int, int]:
    """``times`` of the same sequence of pieces, one behind the other; ``joined``: each begins where the last ended."""
    if times == 1:
        return whole, head, inside, tail
    if whole and joined:
        return True, head * times, 0, head * times
    if whole:
        return False, head, (times - 2) * burst_bytes(head, burst), head
    between = burst_bytes(tail + head, burst) if joined else burst_bytes(tail, burst) + burst_bytes(head, burst)
    return False, head, times * inside + (times - 1) * between, tail


@compiled
def moved_bytes(transfers: NDArray[np.int64], chained: NDArray[np.int64], burst: int) -> NDArray[np.int64]:
    """Bytes that each transfer adds to those of its request, (transfers,).

    ``transfers`` is (transfers, 8), those of one queue in order; ``chained`` 1: of the same request as the one before.
    A run that begins in DRAM where the one before it ended continues its piece; each piece moves in whole bursts.
    """
    result = np.zeros(len(transfers), np.int64)
    open_piece = 0  # bytes of the request's last piece so far
    end = 0  # where it ends in DRAM
    for i in range(len(transfers)):
        if not chained[i]:
            open_piece = 0
        address, run = transfers[i, ADDRESS], transfers[i, RUN]
        # A sequence of pieces: the first and the last are open to what stands before and behind; "whole": one piece.
        whole, head, inside, tail = True, run, 0, run
        last = 0  # from the first run to the last one
        for loop in (2, 1, 0):
            times, stride = transfers[i, COUNT + loop], transfers[i, STRIDE + loop]
            if times == 0:
                whole, head, inside, tail = True, 0, 0, 0
                break
            whole, head, inside, tail = _repeat(whole, head, inside, tail, times, stride - last == run, burst)
            last += (times - 1) * stride
        if head == 0:
            continue
        before = burst_bytes(open_piece, burst)
        joined = open_piece > 0 and address == end
        first = head + open_piece if joined else head
        total = burst_bytes(first, burst) - (before if joined else 0)
        if not whole:
            total += inside + burst_bytes(tail, burst)
        result[i] = total
        open_piece = first if whole else tail
        end = address + last + run
    return result
