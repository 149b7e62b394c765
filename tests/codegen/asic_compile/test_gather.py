"""Gathering bytes with strided transfers: what they bring, by walking their loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from accel_sim.program.isa import Loops
from codegen.asic_compile.gather import gather
from codegen.asic_compile.transfers import Transfer


def brought(transfers: list[Transfer], target: int, count: int) -> NDArray[np.int64]:
    """The source of each byte from ``target`` on; -1 where none arrives, and no byte may arrive twice."""
    found = np.full(count, -1)
    for transfer in transfers:
        loops = transfer.loops
        for index in np.ndindex(*loops.counts, loops.run):
            *turns, byte = index
            far = transfer.dram_address + byte + int(np.dot(turns, loops.dram_strides))
            near = transfer.chip_address + byte + int(np.dot(turns, loops.chip_strides)) - target
            assert found[near] == -1
            found[near] = far
    return found


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(0, 9))
def test_any_bytes_arrive_once_each_in_their_place(sources: list[int], target: int) -> None:
    given_ = np.array(sources)
    transfers = gather(given_, target)
    assert brought(transfers, target, len(sources)).tolist() == sources == given_.tolist()
    assert all(t.loops.run >= 1 and min(t.loops.chip_strides) >= 0 for t in transfers)


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), st.permutations(range(4)))
def test_permuted_axes_arrive_in_their_place(shape: list[int], axes: list[int]) -> None:
    sources = np.arange(np.prod(shape)).reshape(shape).transpose(axes).reshape(-1)
    assert (brought(gather(sources, 3), 3, sources.size) == sources).all()


@pytest.mark.parametrize(
    ("sources", "loops"),
    [
        (np.arange(24), Loops(24)),
        (np.arange(24) * 2, Loops(1, (1, 1, 24), (0, 0, 2), (0, 0, 1))),
        (np.arange(24).reshape(4, 6)[:, :5].reshape(-1), Loops(5, (1, 1, 4), (0, 0, 6), (0, 0, 5))),
        (np.arange(12).reshape(3, 4).T.reshape(-1), Loops(1, (1, 3, 4), (0, 4, 1), (0, 1, 3))),
        (np.arange(256).reshape(4, 4, 4, 4)[..., ::2].reshape(-1), Loops(1, (1, 1, 128), (0, 0, 2), (0, 0, 1))),
        (
            np.arange(256).reshape(4, 4, 4, 4)[:, :2, :3, :3].reshape(-1),
            Loops(3, (4, 2, 3), (64, 16, 4), (18, 9, 3)),
        ),
        (np.tile(np.arange(3), 4), Loops(3, (1, 1, 4), (0, 0, 0), (0, 0, 3))),
    ],
    ids=["a run", "every second byte", "a box", "transposed", "every second of a row", "three loops", "repeated"],
)
def test_regular_bytes_are_one_transfer(sources: NDArray[np.int64], loops: Loops) -> None:
    (transfer,) = gather(sources, 0)
    assert (transfer.dram_address, transfer.chip_address) == (0, 0)
    assert transfer.loops == loops
