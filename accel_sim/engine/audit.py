"""Conservation: what was loaded is used, what is an output is written once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel_sim.engine.effects import Effect
from accel_sim.engine.layout import map_shape
from accel_sim.engine.scratchpad import Box, Memory
from accel_sim.program.isa import Load, Program, Store


@dataclass(frozen=True)
class Audit:
    """Bytes. ``loaded``: by loads, ``unused`` of them were overwritten or left without having been read.

    ``output``: of the program's outputs; ``unwritten`` of them no store wrote, and ``rewritten`` more than one did
    (what the host writes is neither).
    """

    loaded_bytes: int
    unused_bytes: int
    output_bytes: int
    unwritten_bytes: int
    rewritten_bytes: int


class Auditor:
    """Follows the effects of a run, in the order in which they come about."""

    def __init__(self, program: Program, on_chip: tuple[Memory, ...]) -> None:
        self.program = program
        self._fresh = {memory.name: np.zeros(memory.size, np.bool_) for memory in on_chip}
        self._stores = np.zeros(program.dram_bytes, np.uint8)
        self._host = np.zeros(program.dram_bytes, np.bool_)
        self._loaded = 0
        self._unused = 0

    def effect(self, effect: Effect) -> None:
        """Call it for every effect, once."""
        for box in effect.reads:
            fresh = self._fresh.get(box.memory.name)
            if fresh is not None:
                box.mark(fresh, False if box.used is None else box.flags(fresh) & ~box.used)
        write = effect.write
        instruction = self.program.code[effect.index]
        fresh = self._fresh.get(write.memory.name)
        if fresh is not None:
            self._unused += int(np.count_nonzero(write.flags(fresh)))
            write.mark(fresh, isinstance(instruction, Load))
            self._loaded += int(np.prod(write.shape)) if isinstance(instruction, Load) else 0
        elif isinstance(instruction, Store):
            counts = np.ndarray(write.shape, np.uint8, self._stores, write.start, write.strides)
            np.minimum(counts + np.uint8(1), np.uint8(2), out=counts)

    def host(self, box: Box) -> None:
        """The host has written ``box``."""
        box.mark(self._host, True)

    def result(self) -> Audit:
        wanted: NDArray[np.bool_] = np.zeros(len(self._stores), np.bool_)
        for tensor in self.program.tensors:
            if tensor.role == "output":
                images, channels, positions = map_shape(tensor.shape)
                wanted[tensor.address : tensor.address + images * channels * positions] = True
        return Audit(
            self._loaded,
            self._unused + sum(int(np.count_nonzero(fresh)) for fresh in self._fresh.values()),
            int(np.count_nonzero(wanted)),
            int(np.count_nonzero(wanted & ~self._host & (self._stores == 0))),
            int(np.count_nonzero(wanted & (self._stores > 1))),
        )
