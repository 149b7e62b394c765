"""Where tensors lie in DRAM: a map in the program's layout, or its bytes in another order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.layout import byte_offsets, map_shape
from codegen.asic_compile.transfers import WholeMap


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor's bytes. ``offsets``: from ``address`` on, of each element, in the tensor's shape."""

    address: int
    offsets: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        return int(self.offsets.size)

    def is_map(self, shape: tuple[int, ...], columns: int) -> bool:
        """Whether the bytes lie as a map of ``shape`` does; the tensor may have another shape of as many elements."""
        return bool(np.array_equal(self.offsets.reshape(-1), byte_offsets(shape, columns).reshape(-1)))

    def reshaped(self, shape: tuple[int, ...]) -> Place:
        """The same bytes as a tensor of another shape, in row-major order of the elements."""
        return Place(self.address, self.offsets.reshape(shape))


def whole_map(address: int, shape: tuple[int, ...]) -> WholeMap:
    """The map of a tensor of ``shape`` at ``address``. ValueError for more than three axes beside (N, C)."""
    images, channels, _ = map_shape(shape)
    axes = shape[2:]
    if len(axes) > 3:
        raise ValueError(f"a map has at most three axes, not {len(axes)}")
    size: Any = (*(1,) * (3 - len(axes)), *axes)
    return WholeMap(address, images, channels, size)


def rows_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix with leading axes as rows x features."""
    return prod(shape[:-1]), shape[-1]
