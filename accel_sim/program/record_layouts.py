"""The layouts of fixed-size records: which field lies at which byte.

An instruction is a record of 96 bytes whose first byte is its opcode; :data:`INSTRUCTIONS` has the layout of each. All
numbers are little endian; bytes that no field covers are zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from accel_sim.program.isa import (
    Dataflow,
    Halt,
    Host,
    Load,
    Loops,
    Matmul,
    Output,
    Preload,
    Queue,
    Space,
    Store,
    Sum,
    Sync,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
    Window,
)

INSTRUCTION_BYTES = 96


class Opcode(IntEnum):
    """First byte of an instruction; 0 is none, so that no run of zeros is a program."""

    LOAD = 1
    PRELOAD = 2
    MATMUL = 3
    VECTOR = 4
    STORE = 5
    SYNC = 6
    HOST = 7
    HALT = 8


QUEUE_OF: dict[Opcode, Queue | None] = {
    Opcode.LOAD: Queue.LOAD,
    Opcode.PRELOAD: Queue.EXECUTE,
    Opcode.MATMUL: Queue.EXECUTE,
    Opcode.VECTOR: Queue.EXECUTE,
    Opcode.STORE: Queue.STORE,
    Opcode.SYNC: None,
    Opcode.HOST: None,
    Opcode.HALT: None,
}
"""None: all queues meet."""


@dataclass(frozen=True)
class Record:
    """Layout of one class: ``dtype``, and the fields that hold a truth value or a member of an enumeration."""

    cls: type[Any]
    dtype: np.dtype[np.void]
    opcode: int = 0
    """0: a descriptor, which has no opcode."""
    booleans: frozenset[str] = frozenset()
    enums: Mapping[str, type[IntEnum] | type[Token]] = dataclasses.field(default_factory=dict)
    nonnegative: frozenset[str] = frozenset()

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the class in its own order; those of ``loops`` as ``loops.run`` and so on."""
        names: list[str] = []
        for field in dataclasses.fields(self.cls):
            if field.name == "loops":
                names += [f"loops.{inner.name}" for inner in dataclasses.fields(Loops)]
            else:
                names.append(field.name)
        return tuple(names)


_FORMATS = {"b": "<i4", "q": "<i8", "f": "<f4", "t": "u1", "v": ("<i4", (3,)), "w": ("<i8", (3,))}


def _dtype(size_bytes: int, layout: str) -> np.dtype[np.void]:
    """``layout``: "name@offset:kind ..." with kinds t byte, b 32 bit, q 64 bit, f float32, v/w three of 32/64 bit."""
    names, offsets, formats = [], [], []
    for entry in layout.split():
        name, rest = entry.split("@")
        offset, kind = rest.split(":")
        names.append(name)
        offsets.append(int(offset))
        formats.append(_FORMATS[kind])
    return np.dtype({"names": names, "offsets": offsets, "formats": formats, "itemsize": size_bytes})


_TOKENS: dict[str, type[IntEnum] | type[Token]] = {"wait": Token, "post": Token}
_HEAD = "opcode@0:t wait@1:t post@2:t"


def _instruction(
    cls: type[Any],
    opcode: Opcode,
    layout: str,
    booleans: Iterable[str] = (),
    enums: Mapping[str, type[IntEnum]] | None = None,
) -> Record:
    tokens = QUEUE_OF[opcode] is not None
    dtype = _dtype(INSTRUCTION_BYTES, f"{_HEAD if tokens else 'opcode@0:t'} {layout}")
    return Record(cls, dtype, opcode, frozenset(booleans), (_TOKENS if tokens else {}) | dict(enums or {}))


CODE = _dtype(INSTRUCTION_BYTES, _HEAD)
"""What all instructions have in common; a view of the same bytes per opcode has the rest."""

INSTRUCTIONS: dict[Opcode, Record] = {
    Opcode.LOAD: _instruction(
        Load,
        Opcode.LOAD,
        "chained@3:t space@4:t dram_address@8:q chip_address@16:b run@20:b counts@24:v chip_strides@36:v "
        "dram_strides@48:w",
        ["chained"],
        {"space": Space},
    ),
    Opcode.PRELOAD: _instruction(Preload, Opcode.PRELOAD, ""),
    Opcode.MATMUL: _instruction(
        Matmul,
        Opcode.MATMUL,
        "accumulate@3:t dataflow@4:t window@8:b input_address@12:b weight_address@16:b accumulator_address@20:b "
        "bias_address@24:b channels@28:b filters@32:b first_channel@36:b",
        ["accumulate"],
        {"dataflow": Dataflow},
    ),
    Opcode.VECTOR: _instruction(
        Vector,
        Opcode.VECTOR,
        "spec@8:b a_address@12:b b_address@16:b output_address@20:b elements@24:b operations@32:q",
    ),
    Opcode.STORE: _instruction(
        Store,
        Opcode.STORE,
        "chained@3:t to_scratchpad@4:t address@8:q accumulator_address@16:b run@20:b counts@24:v chip_strides@36:v "
        "dram_strides@48:w residual_address@72:b output@76:b first_channel@80:b block_channels@84:b lanes@88:b",
        ["chained", "to_scratchpad"],
    ),
    Opcode.SYNC: _instruction(Sync, Opcode.SYNC, "marker@8:b"),
    Opcode.HOST: _instruction(Host, Opcode.HOST, "call@8:b"),
    Opcode.HALT: _instruction(Halt, Opcode.HALT, ""),
}

WINDOW = Record(
    Window,
    _dtype(
        96,
        "images@0:b channels@4:b extent@8:v out@20:v kernel@32:v strides@44:v dilations@56:v origin@68:v "
        "pad_value@80:b signed@84:t",
    ),
    booleans=frozenset(["signed"]),
)
OUTPUT = Record(
    Output,
    _dtype(
        32,
        "scales@0:b zero_point@4:b low@8:b high@12:b table@16:b sum@20:b sum_table@24:b per_channel@28:t signed@29:t",
    ),
    booleans=frozenset(["per_channel", "signed"]),
)
SUM = Record(
    Sum,
    _dtype(
        32,
        "own_ratio@0:f other_ratio@4:f offset@8:f low@12:b high@16:b "
        "own_first@28:t own_signed@29:t other_signed@30:t signed@31:t",
    ),
    booleans=frozenset(["own_first", "own_signed", "other_signed", "signed"]),
)
VECTOR_SPEC = Record(
    VectorSpec,
    _dtype(
        48,
        "function@0:t signed@1:t count_padding@2:t sum@4:b table@8:b window@12:b ratio@16:f a_zero@20:b b_zero@24:b "
        "zero_point@28:b low@32:b high@36:b divisor@40:f",
    ),
    booleans=frozenset(["signed", "count_padding"]),
    enums={"function": VectorFunction},
)
DESCRIPTORS: dict[str, Record] = {"windows": WINDOW, "outputs": OUTPUT, "sums": SUM, "vectors": VECTOR_SPEC}
"""By section, which is also the name of the program's field."""
