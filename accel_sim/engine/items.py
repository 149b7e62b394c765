"""Items: what begins and ends as one, and which tokens it waits for.

An item is an instruction of the execute queue, or a request of the load or store queue: the head and the
instructions chained to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.errors import refuse
from accel_sim.jit import compiled
from accel_sim.pricing.array import ceil_div
from accel_sim.pricing.machine import RATE
from accel_sim.program.isa import Queue, Token

BARRIER = 3
"""The queue of Sync, Host and Halt."""

MAY_WAIT = (int(Token.FREED), int(Token.LOADED | Token.STORED), int(Token.COMPUTED), 0)
MAY_POST = (int(Token.LOADED), int(Token.FREED | Token.COMPUTED), int(Token.STORED), 0)
"""Tokens by queue, the barriers' included."""


@dataclass(frozen=True)
class Items:
    """What one queue carries out, in order; arrays of one entry per item.

    ``first``/``last``: instructions of the code. ``segment``: how many barriers stand before. ``cycles``: of data on
    the channel, of the way into the scratchpad, or of the array or vector unit. ``local``: not over the channel.
    ``waits``/``posts`` hold, per kind of token, which one of its kind in all the program is waited for or posted,
    shape (4, items), -1 for none; the kinds in the order of their bits.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    segment: NDArray[np.int64]
    cycles: NDArray[np.int64]
    local: NDArray[np.bool_]
    waits: NDArray[np.int64]
    posts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)


_REFUSALS = (
    "",
    "a chained transfer without one before it",
    "a chained transfer behind a barrier",
    "a chained transfer waits for nothing",
    "only the last transfer of a request posts",
    "a request goes one way: over the channel or into the scratchpad",
)


@compiled
def _group(
    which: int,
    queue: NDArray[np.int8],
    rows: NDArray[np.int64],
    segment: NDArray[np.int64],
    cycles: NDArray[np.int64],
    moved: NDArray[np.int64],
    rate: int,
    spans: NDArray[np.int64],
    tokens: NDArray[np.int64],
) -> tuple[int, int, int]:
    """Fills ``spans`` (first, last, segment, cycles, local) and ``tokens`` (waits, posts; kinds); gives the number of
    items, or of the refusal and the instruction that it concerns.
    """
    count = 0
    before = -1
    data = 0
    numbers = np.zeros((2, 4), np.int64)
    for i in range(queue.size):
        if queue[i] != which:
            continue
        wait, post, chained, local = rows[i, 0], rows[i, 1], rows[i, 2], rows[i, 3]
        if chained:
            if before < 0:
                return 0, 1, i
            if segment[i] != segment[before]:
                return 0, 2, i
            if wait:
                return 0, 3, i
            if rows[before, 1]:
                return 0, 4, before
            if rows[before, 3] != local:
                return 0, 5, i
        else:
            count += 1
            data = 0
            spans[0, count - 1] = i
            spans[2, count - 1] = segment[i]
            spans[3, count - 1] = 0
            spans[4, count - 1] = local
            tokens[:, :, count - 1] = -1
        item = count - 1
        spans[1, item] = i
        if which == 1 or local:
            spans[3, item] += cycles[i]
        else:
            data += moved[i]
            spans[3, item] = ceil_div(data * RATE, rate)
        for kind in range(4):
            if wait >> kind & 1:
                tokens[0, kind, item] = numbers[0, kind]
                numbers[0, kind] += 1
            if post >> kind & 1:
                tokens[1, kind, item] = numbers[1, kind]
                numbers[1, kind] += 1
        before = i
    return count, 0, -1


def items_of(
    which: Queue,
    queue: NDArray[np.int8],
    rows: NDArray[np.int64],
    segment: NDArray[np.int64],
    cycles: NDArray[np.int64],
    moved: NDArray[np.int64],
    rate: int,
) -> Items:
    """Groups the instructions of one queue into items; ProgramError for chains that are none.

    ``rows``: wait, post, chained, into the scratchpad, of all instructions. ``cycles`` and ``moved`` are theirs too.
    """
    spans, tokens = np.empty((5, len(queue)), np.int64), np.empty((2, 4, len(queue)), np.int64)
    count, refusal, index = _group(int(which), queue, rows, segment, cycles, moved, rate, spans, tokens)
    if refusal:
        raise refuse(index, _REFUSALS[refusal])
    first, last, own, data, local = spans[:, :count]
    waits, posts = np.ascontiguousarray(tokens[:, :, :count])
    return Items(first, last, own, data, local != 0, waits, posts)


@compiled
def _count_tokens(segment: NDArray[np.int64], numbers: NDArray[np.int64], sign: int, left: NDArray[np.int64]) -> None:
    for item in range(segment.size):
        for kind in range(4):
            if numbers[kind, item] >= 0:
                left[segment[item], kind] += sign


def check_balance(items: tuple[Items, ...], barriers: NDArray[np.int64]) -> None:
    """Between two barriers as many tokens of each kind are posted as are waited for; too few are a deadlock's cause."""
    left = np.zeros((len(barriers), 4), np.int64)
    for part in items:
        _count_tokens(part.segment, part.posts, 1, left)
        _count_tokens(part.segment, part.waits, -1, left)
    if left.max(initial=0) > 0:
        segment, kind = (int(at) for at in np.argwhere(left > 0)[0])
        over = int(left[segment, kind])
        raise refuse(int(barriers[segment]), f"{over} {Token(1 << kind).name} left over where all queues meet")
