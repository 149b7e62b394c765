"""Sizes of the memories, and whether what instructions access lies inside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.accesses import MEMORY_NAMES, SCRATCHPAD, Accesses
from accel_sim.program.code_order import Flags, Ints, refuse
from accel_sim.program.isa import Program
from accel_sim.program.records import descriptor_table
from accel_sim.spec import MachineSpec

_FAR = float(1 << 60)
"""No memory is as large; numbers below do not overflow when two are added."""


class Memories:
    """Sizes of the memories, and the one way to say that something lies outside."""

    def __init__(self, program: Program, spec: MachineSpec, accesses: Accesses) -> None:
        pads = spec.scratchpads
        self.word_bytes = spec.datatypes.accumulator_bytes
        self.sizes = (program.dram_bytes, 1024 * (pads.input_kib + pads.weight_kib), 1024 * pads.accumulator_kib)
        self.whole = (0, self.sizes[SCRATCHPAD])
        split = 1024 * pads.input_kib
        self.inputs = self.whole if pads.shared_input_weight else (0, split)
        self.weights = self.whole if pads.shared_input_weight else (split, self.sizes[SCRATCHPAD])
        self.accesses = accesses

    def add(
        self,
        what: str,
        at: Ints,
        memory: int,
        write: bool,
        base: Ints,
        run: Ints,
        counts: Ints | None = None,
        strides: Ints | None = None,
        limits: tuple[int, int] | None = None,
        used: bool = True,
    ) -> None:
        """Checks that transfers lie in ``memory`` (or ``limits`` of it) and, with ``used``, collects them."""
        if not len(at):
            return
        low_limit, high_limit = limits or (0, self.sizes[memory])
        counts = np.ones((len(at), 3), np.int64) if counts is None else counts
        strides = np.zeros((len(at), 3), np.int64) if strides is None else strides
        # In float64 nothing overflows, and what is inside a memory is exact.
        reach = (counts - 1).astype(np.float64) * strides
        low = base.astype(np.float64) + np.minimum(reach, 0).sum(axis=1)
        high = base.astype(np.float64) + np.maximum(reach, 0).sum(axis=1) + run
        part = "" if limits in (None, self.whole) else " for this"
        refuse(
            (low < low_limit) | (high > high_limit),
            at,
            lambda place: (
                f"{what}: bytes {low[place]:.0f} to {high[place]:.0f} of the {MEMORY_NAMES[memory]}; expected "
                f"{low_limit} to {high_limit}, which is what it has{part}"
            ),
        )
        if write:
            moved = run.astype(np.float64) * counts.astype(np.float64).prod(axis=1)
            refuse(
                moved > high - low,
                at,
                lambda place: (
                    f"{what}: {moved[place]:.0f} bytes into {high[place] - low[place]:.0f} of the "
                    f"{MEMORY_NAMES[memory]}; expected each to be written once"
                ),
            )
        if used:
            self.accesses.add(at, memory, write, base, run, counts, strides)

    def check_aligned(self, at: Ints, address: Ints) -> None:
        refuse(
            address % self.word_bytes != 0,
            at,
            lambda place: (
                f"accumulator address {address[place]:#x}; expected a multiple of the word's {self.word_bytes} bytes"
            ),
        )


def at_least(at: Ints, values: NDArray[Any], name: str, smallest: int) -> None:
    bad: Flags = np.less(values, smallest).reshape(len(at), values.size // max(len(at), 1)).any(axis=1)
    refuse(
        bad,
        at,
        lambda place: f"{name} is {','.join(map(str, np.atleast_1d(values[place])))}; expected at least {smallest}",
    )


def loop_columns(at: Ints, records: Any) -> tuple[Ints, Ints, Ints, Ints]:
    """Run, counts, DRAM strides and chip strides of transfers."""
    run, counts = records["run"].astype(np.int64), records["counts"].astype(np.int64)
    at_least(at, run, "run", 1)
    at_least(at, counts, "counts", 1)
    strides = records["dram_strides"].astype(np.int64), records["chip_strides"].astype(np.int64)
    for name, values in zip(("dram_strides", "chip_strides"), strides, strict=True):
        refuse(
            ((counts == 1) & (values != 0)).any(axis=1),
            at,
            lambda place, name=name, values=values: (  # type: ignore[misc]
                f"{name} is {','.join(map(str, values[place]))}; expected 0 where the loop's count is 1"
            ),
        )
    return run, counts, *strides


def window_columns(program: Program, index: NDArray[Any]) -> dict[str, Ints]:
    table = descriptor_table("windows", program.windows)[index]
    columns = {name: table[name].astype(np.int64) for name in table.dtype.names or ()}
    # Products of three 31-bit numbers; what does not fit is larger than any memory, and is cut off.
    for name, of in (("positions", "extent"), ("outputs", "out"), ("taps", "kernel")):
        exact = np.minimum(columns[of].astype(np.float64).prod(axis=1), _FAR)
        columns[name] = exact.astype(np.int64)
    return columns


def product(*factors: Ints) -> Ints:
    """A product of nonnegative numbers, cut off at 2^60."""
    value = np.ones(len(factors[0]))
    for factor in factors:
        value = np.minimum(value * factor, _FAR)
    return value.astype(np.int64)
