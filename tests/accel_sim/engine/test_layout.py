"""The layout of maps against the formula of the instruction set, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_sim.engine.layout import byte_offsets, pack_map, unpack_map


def formula(shape: tuple[int, ...], columns: int, at: tuple[int, ...]) -> int:
    """``i * channels * P + b * columns * P + ((d * H + h) * W + w) * width + c % columns``."""
    channels = shape[1]
    depth, height, width = (*(1,) * (5 - len(shape)), *shape[2:])
    i, c = at[:2]
    d, h, w = (*(0,) * (5 - len(shape)), *at[2:])
    positions, block = depth * height * width, c // columns
    lanes = min(columns, channels - block * columns)
    return i * channels * positions + block * columns * positions + ((d * height + h) * width + w) * lanes + c % columns


@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 3), st.integers(1, 11), st.integers(1, 6))
def test_every_element_lies_where_the_formula_says(axes: list[int], images: int, channels: int, columns: int) -> None:
    shape = (images, channels, *axes)
    values = np.random.default_rng(0).integers(-128, 128, (2, *shape)).astype(np.int8)
    packed = pack_map(values, shape, columns)
    offsets = byte_offsets(shape, columns)
    assert sorted(offsets.reshape(-1).tolist()) == list(range(int(np.prod(shape))))
    for at in np.ndindex(*shape):
        assert offsets[at] == formula(shape, columns, at)
        for sample in range(2):
            assert packed[sample, offsets[at]].view(np.int8) == values[(sample, *at)]
    np.testing.assert_array_equal(unpack_map(packed, shape, columns, signed=True), values)


def test_vectors_and_scalars_are_one_row() -> None:
    values = np.arange(5, dtype=np.uint8)[None]
    assert pack_map(values, (5,), 3).tolist() == [[0, 1, 2, 3, 4]]
    assert unpack_map(np.array([[7]], np.uint8), (), 3, signed=False).tolist() == [7]


def test_other_types_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="int16"):
        pack_map(np.zeros((1, 2, 3), np.int16), (2, 3), 16)
    with pytest.raises(ValueError, match="shape"):
        pack_map(np.zeros((1, 2, 3), np.int8), (3, 2), 16)
    with pytest.raises(ValueError, match="6 were expected"):
        unpack_map(np.zeros((1, 7), np.uint8), (2, 3), 16, signed=True)
