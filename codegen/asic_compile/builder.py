"""A program in the making: code, tables without doubles, and the DRAM image."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.isa import (
    Halt,
    Host,
    HostCall,
    Instruction,
    Marker,
    Output,
    Program,
    Sum,
    Sync,
    Tensor,
    VectorSpec,
    Window,
)
from accel_sim.program.machine_hash import spec_hash
from accel_sim.spec import MachineSpec
from codegen.asic_compile.transfers import WholeMap

T = TypeVar("T", bound=Hashable)

_ALIGNMENT = 64


class Table(dict[T, int]):
    """Entries by value, each once, numbered in the order in which they came."""

    def number(self, entry: T) -> int:
        return self.setdefault(entry, len(self))


class Builder:
    """Collects a program. All maps are given their place before the first constant is."""

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.code: list[Instruction] = []
        self.windows: Table[Window] = Table()
        self.outputs: Table[Output] = Table()
        self.sums: Table[Sum] = Table()
        self.vectors: Table[VectorSpec] = Table()
        self.tables: Table[bytes] = Table()
        self._scales: Table[tuple[float, ...]] = Table()
        self._scale_starts: list[int] = [0]
        self.tensors: list[Tensor] = []
        self.markers: list[Marker] = []
        self.calls: list[HostCall] = []
        self._end = 0
        self._constants = bytearray()
        self._constants_address = -1

    @property
    def columns(self) -> int:
        return self.spec.array.columns

    def place(self, images: int, channels: int, size: tuple[int, int, int]) -> WholeMap:
        """Room for a map in DRAM. Maps do not touch, so that no transfer runs on from one into the next."""
        assert self._constants_address < 0, "maps are placed before constants"
        found = WholeMap(self._end, images, channels, size)
        self._end = _aligned(self._end + found.bytes + 1)
        return found

    def constant(self, data: bytes) -> int:
        """The DRAM address of constant bytes, behind those that came before."""
        if self._constants_address < 0:
            self._constants_address = self._end
        address = self._constants_address + len(self._constants)
        self._constants += data
        return address

    def separate_constants(self) -> None:
        """The next constant does not continue the one before."""
        if self._constants_address >= 0:
            self._constants += bytes(_aligned(len(self._constants) + 1) - len(self._constants))

    def window(self, window: Window) -> int:
        """Number of a window. Its strides (dilations) are 1 along axes that have one position (tap)."""
        strides: Any = tuple(step if count > 1 else 1 for step, count in zip(window.strides, window.out, strict=True))
        dilations: Any = tuple(
            step if count > 1 else 1 for step, count in zip(window.dilations, window.kernel, strict=True)
        )
        return self.windows.number(replace(window, strides=strides, dilations=dilations))

    def scales(self, values: NDArray[Any]) -> int:
        """Index of the first of ``values`` in the table of scales."""
        entry = tuple(float(value) for value in np.asarray(values, np.float32))
        number = self._scales.number(entry)
        if number + 1 == len(self._scale_starts):
            self._scale_starts.append(self._scale_starts[-1] + len(entry))
        return self._scale_starts[number]

    def begin(self, marker: Marker) -> None:
        """All that follows belongs to ``marker``'s layer."""
        self.code.append(Sync(len(self.markers)))
        self.markers.append(marker)

    def predict(self, cycles: int) -> None:
        """Cycles of the layer that was begun last, where the price list knew no better than by its shapes."""
        self.markers[-1] = replace(self.markers[-1], predicted_cycles=cycles)

    def call(self, call: HostCall) -> None:
        self.code.append(Host(len(self.calls)))
        self.calls.append(call)

    def program(self) -> Program:
        """The finished program."""
        address = self._end if self._constants_address < 0 else self._constants_address
        return Program(
            spec_hash=spec_hash(self.spec),
            columns=self.columns,
            code=(*self.code, Halt()),
            windows=tuple(self.windows),
            outputs=tuple(self.outputs),
            sums=tuple(self.sums),
            vectors=tuple(self.vectors),
            scales=tuple(value for entry in self._scales for value in entry),
            tables=tuple(self.tables),
            tensors=tuple(self.tensors),
            markers=tuple(self.markers),
            calls=tuple(self.calls),
            constants=bytes(self._constants),
            constants_address=address,
            dram_bytes=max(address + len(self._constants), 1),
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
