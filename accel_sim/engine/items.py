"""Items: what begins and ends as one, and which tokens it waits for.

An item is an instruction of the execute queue, or a request of the load or store queue: the head and the
instructions chained to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.errors import refuse
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


def items_of(
    which: Queue,
    queue: NDArray[np.int8],
    rows: NDArray[np.int64],
    segment: NDArray[np.int64],
    cycles: NDArray[np.int64],
    moved: NDArray[np.int64],
    rate: int,
) -> Items:
    """Groups the instructions of one queue into items; checks chains.

    ``rows``: wait, post, chained, into the scratchpad, of all instructions. ``cycles`` and ``moved`` are theirs too.
    """
    at = np.flatnonzero(queue == which)
    wait, post, chained, local = rows[at].T
    heads = np.flatnonzero(chained == 0)
    if len(at) and chained[0]:
        raise refuse(int(at[0]), "a chained transfer without one before it")
    split = np.flatnonzero((chained[1:] == 1) & (segment[at[1:]] != segment[at[:-1]])) if len(at) else at
    if len(split):
        raise refuse(int(at[split[0] + 1]), "a chained transfer behind a barrier")
    if ((chained == 1) & (wait != 0)).any():
        raise refuse(int(at[np.flatnonzero((chained == 1) & (wait != 0))[0]]), "a chained transfer waits for nothing")
    lasts = np.append(heads[1:] - 1, len(at) - 1) if len(heads) else heads
    inner = np.ones(len(at), np.bool_)
    inner[lasts] = False
    if (inner & (post != 0)).any():
        raise refuse(int(at[np.flatnonzero(inner & (post != 0))[0]]), "only the last transfer of a request posts")
    mixed = np.flatnonzero((chained[1:] == 1) & (local[1:] != local[:-1])) if len(at) else at
    if len(mixed):
        raise refuse(int(at[mixed[0] + 1]), "a request goes one way: over the channel or into the scratchpad")
    if len(heads):
        data = -(-np.add.reduceat(moved[at], heads) * RATE // rate)
        own = np.add.reduceat(cycles[at], heads)
    else:
        data = own = np.zeros(0, np.int64)
    is_local = local[heads] == 1
    on_channel = np.full(len(heads), which != Queue.EXECUTE) & ~is_local
    bits = np.array([[1], [2], [4], [8]])
    waits, posts = (wait[heads] & bits) != 0, (post[lasts] & bits) != 0
    return Items(
        first=at[heads],
        last=at[lasts],
        segment=segment[at[heads]],
        cycles=np.where(on_channel, data, own),
        local=is_local,
        waits=np.where(waits, np.cumsum(waits, axis=1) - 1, -1),
        posts=np.where(posts, np.cumsum(posts, axis=1) - 1, -1),
    )


def check_balance(items: tuple[Items, ...], segment: NDArray[np.int64], barriers: NDArray[np.int64]) -> None:
    """Between two barriers as many tokens of each kind are posted as are waited for."""
    for kind in range(4):
        posted, waited = np.zeros(len(barriers), np.int64), np.zeros(len(barriers), np.int64)
        for part in items:
            posted += np.bincount(part.segment[part.posts[kind] >= 0], minlength=len(barriers))
            waited += np.bincount(part.segment[part.waits[kind] >= 0], minlength=len(barriers))
        left = np.flatnonzero(posted > waited)
        if len(left):
            over = int(posted[left[0]] - waited[left[0]])
            raise refuse(int(barriers[left[0]]), f"{over} {Token(1 << kind).name} left over where all queues meet")
