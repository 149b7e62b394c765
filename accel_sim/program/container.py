"""``program.bin``: a program as bytes, versioned and checksummed. docs/program.md has it byte by byte.

A header of 128 bytes, a table of eleven sections in a fixed order, then the sections, each at a multiple of 64 bytes
with zeros between. There is exactly one encoding of a program: what :func:`decode` accepts, :func:`encode` gives back
byte for byte. The reader takes no length on trust: every one is compared with the bytes that are there before
anything is made from it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import HostCall, Marker, Program, Tensor
from accel_sim.program.machine_hash import spec_hash
from accel_sim.program.record_layouts import CODE, DESCRIPTORS
from accel_sim.program.records import (
    code_to_table,
    descriptor_table,
    scale_table,
    table_to_code,
    table_to_descriptors,
)
from accel_sim.program.strings import Reader, Writer
from accel_sim.spec import MachineSpec

__all__ = [
    *("MAGIC", "SECTIONS", "VERSION", "decode", "encode", "read_program", "reseal", "section_places"),
    *("spec_hash", "write_program"),
]

MAGIC = b"\x89RKP\r\n\x1a\n"
"""As PNG's: a transfer that changes line ends or the eighth bit is seen at once."""

VERSION = 1

SECTIONS = (
    *("code", "windows", "outputs", "sums", "vectors", "scales", "tables", "tensors", "markers", "calls", "constants"),
)
ROLES = ("input", "output", "internal")
TABLE_BYTES = 256

_ALIGNMENT = 64
_LIMIT = (1 << 63) - 1

# magic, version, header bytes, sections, columns, file bytes, DRAM bytes, constants' address, spec hash, reserved, CRC
_HEADER = struct.Struct("<8sIIIIqqq32s44sI")
# section number, CRC, offset, size, entries, reserved
_ENTRY = struct.Struct("<IIqqII")
_HEADER_BYTES = _HEADER.size + len(SECTIONS) * _ENTRY.size


class _Section(NamedTuple):
    offset: int
    size_bytes: int
    entries: int


def encode(program: Program) -> bytes:
    """The bytes of ``program.bin``. Raises :class:`ProgramError` for values that the format does not hold."""
    parts = [_encode_section(name, program) for name in SECTIONS]
    table = b""
    offset = _aligned(_HEADER_BYTES)
    for number, (data, entries) in enumerate(parts):
        table += _ENTRY.pack(number, zlib.crc32(data), offset, len(data), entries, 0)
        offset = _aligned(offset + len(data))
    if not isinstance(program.spec_hash, bytes) or len(program.spec_hash) != 32:
        raise ProgramError(f"spec_hash is {program.spec_hash!r}; expected 32 bytes", "header")
    header = _HEADER.pack(
        *(MAGIC, VERSION, _HEADER_BYTES, len(SECTIONS)),
        _number("columns", program.columns, 1, (1 << 32) - 1),
        offset,
        _number("dram_bytes", program.dram_bytes, 0, _LIMIT),
        _number("constants_address", program.constants_address, 0, _LIMIT),
        *(program.spec_hash, bytes(44), 0),
    )
    checksum = zlib.crc32(header + table)  # the field of the checksum being 0
    chunks = [header[:-4], struct.pack("<I", checksum), table]
    size = _HEADER_BYTES
    for data, _ in parts:
        chunks += [bytes(_aligned(size) - size), data]
        size = _aligned(size) + len(data)
    chunks.append(bytes(offset - size))
    return b"".join(chunks)


def decode(data: bytes | bytearray | memoryview, spec: MachineSpec | None = None) -> Program:
    """The program in the bytes of a ``program.bin``; with ``spec``, one for another machine is refused.

    Checks the container: lengths, checksums, enumerations, reserved bytes. Whether the program can run is for
    :func:`accel_sim.program.check.check_program` to say. Raises :class:`ProgramError` and nothing else.
    """
    view = memoryview(data).cast("B")
    columns, dram_bytes, constants_address, machine = _read_header(view, spec)
    found = _read_section_table(view)
    values: dict[str, Any] = {}
    for name in SECTIONS:
        section = found[name]
        values[name] = _decode_section(name, view[section.offset : section.offset + section.size_bytes], section)
    return Program(
        spec_hash=machine,
        columns=columns,
        constants_address=constants_address,
        dram_bytes=dram_bytes,
        **values,
    )


def read_program(path: str | Path, spec: MachineSpec | None = None) -> Program:
    """Reads ``program.bin`` as :func:`decode` does; with ``spec``, also checks that the program can run on it.

    Raises :class:`ProgramError`; OSError where the file cannot be read.
    """
    program = decode(Path(path).read_bytes(), spec)
    if spec is not None:
        from accel_sim.program.check import check_program  # brings numba, which reading alone does not need

        check_program(program, spec)
    return program


def write_program(program: Program, path: str | Path) -> None:
    """Writes ``program.bin`` as a whole or not at all: to a file beside it, renamed when it is complete."""
    data = encode(program)
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's own is for its owner alone
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def section_places(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """Where the parts of a container lie that :func:`encode` made: (first byte, the one behind the last) of each.

    The sections by name; "header", "section table" and "checksums", which is what those hold of them; "between", the
    zeros that fill up to the next section.
    """
    checksums = [(_HEADER.size - 4, _HEADER.size)]
    table, between, end = [], [], _HEADER_BYTES
    places = {}
    for number, name in enumerate(SECTIONS):
        at = _HEADER.size + number * _ENTRY.size
        _, _, offset, size, _, _ = _ENTRY.unpack_from(data, at)
        places[name] = [(offset, offset + size)]
        checksums.append((at + 4, at + 8))
        table += [(at, at + 4), (at + 8, at + _ENTRY.size)]
        between.append((end, offset))
        end = offset + size
    return {
        "header": [(0, _HEADER.size - 4)],
        "section table": table,
        **places,
        "between": [*between, (end, len(data))],
        "checksums": checksums,
    }


def reseal(data: bytes | bytearray) -> bytes:
    """``data`` with all checksums recomputed over what its own section table says: for those who forge containers."""
    forged = bytearray(data)
    for number in range(len(SECTIONS)):
        at = _HEADER.size + number * _ENTRY.size
        _, _, offset, size, _, _ = _ENTRY.unpack_from(forged, at)
        if offset >= 0 and size >= 0:
            struct.pack_into("<I", forged, at + 4, zlib.crc32(forged[offset : offset + size]))
    struct.pack_into("<I", forged, _HEADER.size - 4, 0)
    struct.pack_into("<I", forged, _HEADER.size - 4, zlib.crc32(forged[:_HEADER_BYTES]))
    return bytes(forged)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _number(name: str, value: Any, smallest: int, largest: int) -> int:
    if not isinstance(value, int | np.integer) or not smallest <= value <= largest:
        raise ProgramError(f"{name} is {value!r}; expected a whole number of {smallest} to {largest}", "header")
    return int(value)


def _read_header(view: memoryview, spec: MachineSpec | None) -> tuple[int, int, int, bytes]:
    if len(view) < 8 or bytes(view[:8]) != MAGIC:
        raise ProgramError(f"the file begins with {bytes(view[:8])!r}; expected {MAGIC!r}", "header")
    if len(view) < 12:
        raise ProgramError(f"the file has {len(view)} bytes and ends before its version", "header")
    version = int.from_bytes(view[8:12], "little")
    if version != VERSION:
        raise ProgramError(f"format version {version}; this reader knows version {VERSION}", "header")
    if len(view) < _HEADER_BYTES:
        raise ProgramError(f"the file has {len(view)} bytes; expected at least {_HEADER_BYTES}", "header")
    _, _, header_bytes, sections, columns, file_bytes, dram, constants, machine, reserved, checksum = _HEADER.unpack(
        view[: _HEADER.size]
    )
    at = _HEADER.size
    actual = zlib.crc32(view[at:_HEADER_BYTES], zlib.crc32(bytes(4), zlib.crc32(view[: at - 4])))
    if actual != checksum:
        raise ProgramError(f"checksum is {actual:08x}; the header says {checksum:08x}", "header")
    for name, value, expected in (
        ("header size", header_bytes, _HEADER_BYTES),
        ("number of sections", sections, len(SECTIONS)),
        ("file size", file_bytes, len(view)),
    ):
        if value != expected:
            raise ProgramError(f"{name} is {value}; expected {expected}", "header")
    if reserved != bytes(44):
        raise ProgramError("reserved bytes are set; expected zeros", "header")
    _number("columns", columns, 1, (1 << 32) - 1)
    _number("dram_bytes", dram, 0, _LIMIT)
    _number("constants_address", constants, 0, _LIMIT)
    if spec is not None and machine != spec_hash(spec):
        raise ProgramError(
            f"the program is for machine {machine.hex()}; {spec.name!r} is {spec_hash(spec).hex()}", "header"
        )
    return columns, dram, constants, machine


def _read_section_table(view: memoryview) -> dict[str, _Section]:
    """The sections' places: in order, each right behind the one before, zeros between, checksums as said."""
    found = {}
    end = _HEADER_BYTES
    for number, name in enumerate(SECTIONS):
        at = _HEADER.size + number * _ENTRY.size
        kind, checksum, offset, size, entries, reserved = _ENTRY.unpack(view[at : at + _ENTRY.size])
        if kind != number:
            raise ProgramError(f"entry {number} of the section table is for section {kind}; expected {number}", name)
        if reserved:
            raise ProgramError(f"reserved field is {reserved}; expected 0", name)
        if offset != _aligned(end):
            raise ProgramError(f"begins at byte {offset}; expected {_aligned(end)}", name)
        if not 0 <= size <= len(view) - offset:
            raise ProgramError(f"{size} bytes from byte {offset}; the file has {len(view)}", name)
        _check_zeros(view, end, offset, name)
        end = offset + size
        actual = zlib.crc32(view[offset:end])
        if actual != checksum:
            raise ProgramError(f"checksum is {actual:08x}; the section table says {checksum:08x}", name)
        found[name] = _Section(offset, size, entries)
    if len(view) != _aligned(end):
        raise ProgramError(f"the file has {len(view)} bytes; expected {_aligned(end)}", SECTIONS[-1])
    _check_zeros(view, end, len(view), SECTIONS[-1])
    return found


def _check_zeros(view: memoryview, begin: int, end: int, name: str) -> None:
    if any(view[begin:end]):
        raise ProgramError(f"bytes {begin} to {end} between sections are not all zero", name)


def _encode_section(name: str, program: Program) -> tuple[bytes, int]:
    entries: Sequence[Any] = getattr(program, name)
    if name == "code":
        data = code_to_table(program.code).tobytes()
    elif name in DESCRIPTORS:
        data = descriptor_table(name, entries).tobytes()
    elif name == "scales":
        data = scale_table(program.scales).tobytes()
    elif name == "tables":
        for index, table in enumerate(program.tables):
            if not isinstance(table, bytes) or len(table) != TABLE_BYTES:
                raise ProgramError(f"expected {TABLE_BYTES} bytes", name, index)
        data = b"".join(program.tables)
    elif name == "constants":
        data = bytes(program.constants)
    else:
        writer = Writer(name)
        for index, entry in enumerate(entries):
            writer.index = index
            _WRITERS[name](writer, entry)
        data = writer.data()
    if name != "constants" and len(entries) >= 1 << 32:
        raise ProgramError(f"{len(entries)} entries; expected fewer than {1 << 32}", name)
    return data, 0 if name == "constants" else len(entries)


def _decode_section(name: str, data: memoryview, section: _Section) -> Any:
    entry_bytes = _ENTRY_BYTES.get(name)
    if entry_bytes is not None and section.entries * entry_bytes != section.size_bytes:
        raise ProgramError(
            f"{section.size_bytes} bytes; expected {section.entries} entries of {entry_bytes} bytes", name
        )
    if name == "code":
        return table_to_code(np.frombuffer(data, CODE))
    if name in DESCRIPTORS:
        return table_to_descriptors(name, np.frombuffer(data, DESCRIPTORS[name].dtype))
    if name == "scales":
        scales = np.frombuffer(data, "<f4")
        if not np.isfinite(scales).all():
            raise ProgramError("expected a finite number", name, int(np.argmin(np.isfinite(scales))))
        return tuple(scales.tolist())
    if name == "tables":
        return tuple(bytes(data[at : at + TABLE_BYTES]) for at in range(0, len(data), TABLE_BYTES))
    if name == "constants":
        if section.entries:
            raise ProgramError(f"{section.entries} entries; expected 0, constants are bytes", name)
        return bytes(data)
    reader = Reader(data, name)
    values = []
    for index in range(section.entries):  # each takes bytes, so a forged count ends with the section
        reader.index = index
        values.append(_READERS[name](reader))
    reader.end()
    return tuple(values)


_ENTRY_BYTES = {
    "code": CODE.itemsize,
    "scales": 4,
    "tables": TABLE_BYTES,
    **{name: record.dtype.itemsize for name, record in DESCRIPTORS.items()},
}


def _write_tensor(writer: Writer, tensor: Tensor) -> None:
    writer.text("name", tensor.name)
    if tensor.role not in ROLES:
        raise ProgramError(f"role is {tensor.role!r}; expected one of {', '.join(ROLES)}", "tensors", writer.index)
    writer.byte("role", ROLES.index(tensor.role), len(ROLES) - 1)
    writer.byte("signed", tensor.signed, 1)
    writer.word("zero_point", tensor.zero_point)
    writer.real("scale", tensor.scale)
    writer.long("address", tensor.address)
    writer.count("shape", len(tensor.shape))
    for extent in tensor.shape:
        writer.long("shape", extent)


def _read_tensor(reader: Reader) -> Tensor:
    name = reader.text("name")
    role = ROLES[reader.byte("role", len(ROLES) - 1)]
    signed = bool(reader.byte("signed", 1))
    zero_point, scale, address = reader.word(), reader.real("scale"), reader.long()
    shape = tuple(reader.long() for _ in range(reader.count("shape", 8)))
    return Tensor(name, shape, address, scale, zero_point, signed, role)


def _write_marker(writer: Writer, marker: Marker) -> None:
    writer.text("name", marker.name)
    writer.text("op", marker.op)
    writer.texts("nodes", marker.nodes)
    writer.long("predicted_cycles", marker.predicted_cycles)
    writer.long("macs", marker.macs)


def _read_marker(reader: Reader) -> Marker:
    return Marker(reader.text("name"), reader.text("op"), reader.texts("nodes"), reader.long(), reader.long())


def _write_call(writer: Writer, call: HostCall) -> None:
    writer.text("name", call.name)
    writer.text("reason", call.reason)
    writer.texts("inputs", call.inputs)
    writer.texts("outputs", call.outputs)
    writer.blob("model", call.model)


def _read_call(reader: Reader) -> HostCall:
    return HostCall(
        reader.text("name"),
        reader.text("reason"),
        reader.texts("inputs"),
        reader.texts("outputs"),
        reader.blob("model"),
    )


_WRITERS: dict[str, Callable[[Writer, Any], None]] = {
    "tensors": _write_tensor,
    "markers": _write_marker,
    "calls": _write_call,
}
_READERS: dict[str, Callable[[Reader], Any]] = {
    "tensors": _read_tensor,
    "markers": _read_marker,
    "calls": _read_call,
}
