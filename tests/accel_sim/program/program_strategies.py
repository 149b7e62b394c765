"""Random programs: any values that the format holds, whether or not a machine could run them."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from hypothesis import strategies as st

from accel_sim.program.isa import (
    Dataflow,
    Halt,
    Host,
    HostCall,
    Load,
    Loops,
    Marker,
    Matmul,
    Output,
    Preload,
    Program,
    Space,
    Store,
    Sum,
    Sync,
    Tensor,
    Token,
    Vector,
    VectorFunction,
    VectorSpec,
    Window,
)

INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
REAL = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
BYTE_BLOB = st.binary(max_size=100)
WIDE = {"dram_address", "address", "operations", "dram_strides", "predicted_cycles", "macs"}
TOKENS = st.integers(0, 15).map(Token)


def of(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Instances of an instruction or descriptor, field by field."""
    strategies: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(cls):
        kind = get_type_hints(cls)[field.name]
        number = INT64 if field.name in WIDE else INT32
        if kind is bool:
            strategies[field.name] = st.booleans()
        elif kind is Token:
            strategies[field.name] = TOKENS
        elif kind in (Space, Dataflow, VectorFunction):
            strategies[field.name] = st.sampled_from(kind)
        elif kind is Loops:
            strategies[field.name] = of(Loops)
        elif kind is float:
            strategies[field.name] = REAL
        elif kind is int:
            strategies[field.name] = number
        elif kind is str:
            strategies[field.name] = TEXT
        elif kind is bytes:
            strategies[field.name] = BYTE_BLOB
        elif kind == tuple[str, ...]:
            strategies[field.name] = st.lists(TEXT, max_size=3).map(tuple)
        else:
            assert kind == tuple[int, int, int], (cls, field.name)
            strategies[field.name] = st.tuples(number, number, number)
    return st.builds(cls, **strategies)


TENSORS = st.builds(
    Tensor,
    TEXT,
    st.lists(INT64, max_size=5).map(tuple),
    INT64,
    REAL,
    INT32,
    st.booleans(),
    st.sampled_from(["input", "output", "internal"]),
)


def lists(entries: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(entries, max_size=size).map(tuple)


PROGRAMS = st.builds(
    Program,
    spec_hash=st.binary(min_size=32, max_size=32),
    columns=st.integers(1, (1 << 32) - 1),
    code=lists(st.one_of(*map(of, (Load, Preload, Matmul, Vector, Store, Sync, Host, Halt))), 8),
    windows=lists(of(Window)),
    outputs=lists(of(Output)),
    sums=lists(of(Sum)),
    vectors=lists(of(VectorSpec)),
    scales=lists(REAL, 20),
    tables=lists(st.binary(min_size=256, max_size=256), 2),
    tensors=lists(TENSORS),
    markers=lists(of(Marker)),
    calls=lists(of(HostCall)),
    constants=BYTE_BLOB,
    constants_address=st.integers(0, (1 << 63) - 1),
    dram_bytes=st.integers(0, (1 << 63) - 1),
)
