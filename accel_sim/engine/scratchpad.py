"""Memories of bytes, for many independent samples at once, and boxes of them that instructions read and write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.errors import HazardError, refuse


class Memory:
    """``size`` bytes for each of ``samples`` runs of the same program.

    ``written``: the byte has been written. ``varies``: it may differ between the samples; what has been computed from
    constants alone does not.
    """

    def __init__(self, name: str, size: int, samples: int) -> None:
        self.name = name
        self.size = size
        self.samples = samples
        self.data = np.zeros((samples, size), np.uint8)
        self.written = np.zeros(size, np.bool_)
        self.varies = np.zeros(size, np.bool_)


@dataclass(frozen=True)
class Box:
    """Bytes of a memory: from ``start`` on, ``shape`` of them along ``strides`` (in bytes); where ``used`` is given,
    only those of a contiguous box that it holds True for.
    """

    memory: Memory
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] = (1,)
    used: NDArray[np.bool_] | None = None

    @cached_property
    def span(self) -> tuple[int, int]:
        """First byte, and the one behind the last; equal where there is none."""
        low = high = self.start
        for count, stride in zip(self.shape, self.strides, strict=True):
            if count < 1:
                return self.start, self.start
            reach = (count - 1) * stride
            low, high = (low + reach, high) if reach < 0 else (low, high + reach)
        return low, high + 1

    def check(self, index: int) -> None:
        """ProgramError of instruction ``index`` where a byte lies outside the memory."""
        low, high = self.span
        if low < 0 or high > self.memory.size:
            raise refuse(index, f"bytes {low} to {high} of the {self.memory.name}, which has {self.memory.size}")

    def values(self) -> NDArray[np.uint8]:
        """A view of the bytes, shape (samples, *shape). Call :meth:`check` before."""
        data = self.memory.data
        return np.ndarray((len(data), *self.shape), np.uint8, data, self.start, (self.memory.size, *self.strides))

    def flags(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A view of one of the memory's flags, shape ``shape``."""
        return np.ndarray(self.shape, np.bool_, flags, self.start, self.strides)

    def need_written(self, index: int) -> None:
        """HazardError of instruction ``index`` where a byte of the box has never been written."""
        written = self.flags(self.memory.written)
        if self.used is not None:
            written = written | ~self.used
        if not written.all():
            raise HazardError("reads what was never written", index, None, self.memory.name, self.address(~written))

    def address(self, chosen: NDArray[np.bool_]) -> int:
        """Address of the first byte for which ``chosen``, of the box's shape, holds."""
        at = np.argwhere(chosen)[0]
        return self.start + int(sum(int(i) * s for i, s in zip(at, self.strides, strict=True)))

    def mark(self, flags: NDArray[np.bool_], value: bool | NDArray[np.bool_]) -> None:
        """Sets a flag of the bytes."""
        self.flags(flags)[...] = value

    def some_vary(self) -> bool:
        return bool(self.flags(self.memory.varies).any())
