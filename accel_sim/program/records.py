"""Programs as tables of fixed-size records, as they lie in ``program.bin`` and as columns in memory.

A table of code is one array, and a view of it per opcode gives the fields by name::

    table = code_table(program)
    loads = table.view(INSTRUCTIONS[Opcode.LOAD].dtype)
    loads["dram_address"][table["opcode"] == Opcode.LOAD]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Instruction, Loops, Program, Token
from accel_sim.program.record_layouts import CODE, DESCRIPTORS, INSTRUCTIONS, Opcode, Record

Table = NDArray[np.void]
"""A structured array, one record per entry."""

_OPCODE_OF: dict[type[Any], Opcode] = {record.cls: Opcode(record.opcode) for record in INSTRUCTIONS.values()}


def code_table(program: Program) -> Table:
    """The program's code as one table of :data:`CODE` records. Raises :class:`ProgramError`."""
    return code_to_table(program.code)


def code_to_table(code: Sequence[Instruction]) -> Table:
    """Instructions as a table of :data:`CODE` records; 1 to 2 us each. Raises :class:`ProgramError`."""
    opcodes = np.fromiter((_OPCODE_OF.get(type(entry), 0) for entry in code), np.uint8, len(code))
    if not opcodes.all():
        index = int(np.argmin(opcodes))
        raise ProgramError(f"{type(code[index]).__name__} is no instruction", "code", index)
    table = np.zeros(len(code), CODE)
    for opcode, record in INSTRUCTIONS.items():
        at = np.flatnonzero(opcodes == opcode)
        if at.size:
            part = _records(record, [code[i] for i in at.tolist()], "code", at)
            part["opcode"] = opcode
            _bytes_of(table)[at] = _bytes_of(part)  # a copy record by record leaves out what no field covers
    return table


def table_to_code(table: Table) -> tuple[Instruction, ...]:
    """The inverse of :func:`code_to_table`; refuses records that no instruction has."""
    code: list[Any] = [None] * len(table)
    opcodes = table["opcode"]
    known = np.isin(opcodes, np.array(list(Opcode), np.uint8))
    if not known.all():
        index = int(np.argmin(known))
        raise ProgramError(f"opcode is {int(opcodes[index])}; known are {_choices(Opcode)}", "code", index)
    for opcode, record in INSTRUCTIONS.items():
        at = np.flatnonzero(opcodes == opcode)
        part = _bytes_of(table)[at].view(record.dtype)[:, 0]
        for index, entry in zip(at.tolist(), _objects(record, part, "code", at), strict=True):
            code[index] = entry
    return tuple(code)


def descriptor_table(section: str, entries: Sequence[Any]) -> Table:
    """Descriptors of one section as a table with the dtype of ``DESCRIPTORS[section]``."""
    return _records(DESCRIPTORS[section], entries, section, np.arange(len(entries)))


def table_to_descriptors(section: str, table: Table) -> tuple[Any, ...]:
    """The inverse of :func:`descriptor_table`; refuses records that no descriptor has."""
    return tuple(_objects(DESCRIPTORS[section], table, section, np.arange(len(table))))


def scale_table(values: Sequence[float]) -> NDArray[np.float32]:
    """The program's scales as float32, (count,)."""
    return _column(values, np.dtype("<f4"), "scale", "scales", np.arange(len(values)))


def _bytes_of(table: Table) -> NDArray[np.uint8]:
    """The bytes of a contiguous table, (entries, bytes of one), not copied."""
    return table.view(np.uint8).reshape(len(table), table.dtype.itemsize)


def _records(record: Record, entries: Sequence[Any], section: str, at: NDArray[np.int64]) -> Table:
    out = np.zeros(len(entries), record.dtype)
    if not entries:
        return out
    for index, entry in enumerate(entries):
        if type(entry) is not record.cls:
            raise ProgramError(f"{type(entry).__name__} is no {record.cls.__name__}", section, int(at[index]))
    for path in record.fields:
        name = path.removeprefix("loops.")
        try:
            values = list(map(attrgetter(path), entries))
        except AttributeError as error:
            raise ProgramError(f"{record.cls.__name__}: {error}", section) from error
        column = out[name]
        column[...] = _column(values, column.dtype, path, section, at, column.shape[1:])
        _check_members(record, name, column, section, at)
    return out


def _column(
    values: Sequence[Any],
    dtype: np.dtype[Any],
    name: str,
    section: str,
    at: NDArray[np.int64],
    shape: tuple[int, ...] = (),
) -> NDArray[Any]:
    """``values`` as numbers of ``dtype``, none changed on the way."""
    wide = np.dtype(np.float64) if dtype.kind == "f" else np.dtype(np.int64)
    kinds = "iuf" if dtype.kind == "f" else "iub"
    try:
        given = np.array(values) if len(values) else np.zeros((0, *shape), wide)
        fits = given.dtype.kind in kinds and given.shape == (len(values), *shape)
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            column: NDArray[Any] = given.astype(dtype) if fits else np.zeros(0, dtype)
        fits = fits and bool((column.astype(wide) == given).all())
    except (ValueError, TypeError, OverflowError):
        fits = False
    if not fits or (dtype.kind == "f" and not np.isfinite(column).all()):
        raise _bad_value(values, dtype, name, section, at, shape)
    return column


def _bad_value(
    values: Sequence[Any],
    dtype: np.dtype[Any],
    name: str,
    section: str,
    at: NDArray[np.int64],
    shape: tuple[int, ...],
) -> ProgramError:
    if dtype.kind == "f":
        expected = "a finite number that float32 holds exactly"
    else:
        limits = np.iinfo(dtype)
        expected = f"{'three whole numbers' if shape else 'a whole number'} of {limits.min} to {limits.max}"
    for index, value in enumerate(values):
        entries = value if shape and isinstance(value, tuple) else (value,)
        good: bool = len(entries) == (shape[0] if shape else 1) and all(_fits(entry, dtype) for entry in entries)
        if not good:
            return ProgramError(f"{name} is {_short(value)}; expected {expected}", section, int(at[index]))
    return ProgramError(f"{name}: expected {expected}", section)


def _fits(value: Any, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "f":
        try:
            with np.errstate(over="ignore"):
                return bool(np.isfinite(np.float32(value)) and float(np.float32(value)) == value)
        except (TypeError, ValueError, OverflowError):
            return False
    limits = np.iinfo(dtype)
    return isinstance(value, int | np.integer) and bool(limits.min <= value <= limits.max)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _choices(enum: type[IntEnum]) -> str:
    return ", ".join(f"{member.value} {member.name.lower()}" for member in enum)


def _check_members(record: Record, name: str, column: NDArray[Any], section: str, at: NDArray[np.int64]) -> None:
    enum = record.enums.get(name)
    if name in record.booleans:
        bad, expected = column > 1, "0 or 1"
    elif enum is Token:
        bad, expected = column > 15, "0 to 15, a set of tokens"
    elif enum is not None and issubclass(enum, IntEnum):
        bad, expected = ~np.isin(column, [int(member) for member in enum]), f"one of {_choices(enum)}"
    else:
        return
    if bad.any():
        index = int(np.argmax(bad))
        raise ProgramError(f"{name} is {int(column[index])}; expected {expected}", section, int(at[index]))


def _objects(record: Record, table: Table, section: str, at: NDArray[np.int64]) -> list[Any]:
    if not len(table):
        return []
    _check_reserved(record, table, section, at)
    columns: dict[str, list[Any]] = {}
    for name in table.dtype.names or ():
        column = table[name]
        _check_members(record, name, column, section, at)
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            index = int(np.argmin(np.isfinite(column)))
            raise ProgramError(f"{name} is {column[index]}; expected a finite number", section, int(at[index]))
        convert = tuple if column.ndim > 1 else _converter(record, name)
        columns[name] = list(map(convert, column.tolist())) if convert else column.tolist()
    arguments: list[Iterable[Any]] = []
    for field in dataclasses.fields(record.cls):
        if field.name == "loops":
            parts = [columns[inner.name] for inner in dataclasses.fields(Loops)]
            arguments.append(map(Loops, *parts))
        else:
            arguments.append(columns[field.name])
    if not arguments:
        return [record.cls() for _ in range(len(table))]
    return list(map(record.cls, *arguments))


def _converter(record: Record, name: str) -> Callable[[int], Any] | None:
    if name in record.booleans:
        return bool
    enum = record.enums.get(name)
    if enum is None:
        return None
    members: list[Any] = [Token(value) for value in range(16)] if enum is Token else [enum(i) for i in range(len(enum))]
    return members.__getitem__


def _check_reserved(record: Record, table: Table, section: str, at: NDArray[np.int64]) -> None:
    covered = np.zeros(record.dtype.itemsize, bool)
    for format_, offset, *_ in (record.dtype.fields or {}).values():
        covered[offset : offset + format_.itemsize] = True
    raw = _bytes_of(table)
    reserved = np.flatnonzero(~covered)
    bad = raw[:, reserved].any(axis=1)
    if bad.any():
        index = int(np.argmax(bad))
        byte = int(reserved[np.argmax(raw[index, reserved] != 0)])
        raise ProgramError(f"reserved byte {byte} is {raw[index, byte]}; expected 0", section, int(at[index]))
