"""What a compiled library says of itself: one JSON object in a section of the file, named ``.rankc_metadata``.

It is read off the file without loading it, so a library for another processor can be read as well, and
``readelf -p .rankc_metadata model.so`` prints it. In a process that has loaded the library it is the C string
``rankc_metadata``, and what the library's function of that name returns.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from passes.errors import InputError

SCHEMA_VERSION = 1

SECTION = ".rankc_metadata"
SYMBOL = "rankc_metadata"


@dataclass(frozen=True)
class TensorInfo:
    """An input or output. ``dtype`` as NumPy names it; a dimension is a size, or the name of one that is symbolic.

    Where an output's size is computed from others, its name is the formula.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def text(self) -> str:
        """``x: float32[batch, 3, 32, 32]``"""
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    def misfit(self, dtype: str, shape: tuple[int, ...], sizes: dict[str, int]) -> str:
        """Why an array does not fit, empty if it does; ``sizes`` of symbolic dimensions are collected and compared."""
        if dtype != self.dtype:
            return f"{self.name} has dtype {dtype}, expected {self.dtype}"
        known = dict(sizes)
        if len(shape) == len(self.shape) and all(
            have == (want if isinstance(want, int) else sizes.setdefault(want, have))
            for have, want in zip(shape, self.shape, strict=True)
        ):
            return ""
        expected = [f"{dim}={known[dim]}" if isinstance(dim, str) and dim in known else str(dim) for dim in self.shape]
        return f"{self.name} has shape [{', '.join(map(str, shape))}], expected [{', '.join(expected)}]"


@dataclass(frozen=True)
class Metadata:
    """``inputs`` and ``outputs`` in the order of the entry point ``main``.

    ``target``: what it was compiled for, as TVM writes it (``{"kind": "llvm", "mcpu": "znver4", ...}``), and ``device``
    in words where that is known. ``versions``: package -> version of what compiled it. ``network``: SHA-256 of the ONNX
    file that it was made from; ``plan``: of the rank plan, empty where there was none.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    target: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str = ""
    network: str = ""
    plan: str = ""

    def to_json(self) -> str:
        """One line of ASCII."""
        values = {
            "schema": SCHEMA_VERSION,
            "inputs": [_tensor(info) for info in self.inputs],
            "outputs": [_tensor(info) for info in self.outputs],
            "target": dict(self.target),
            "device": self.device,
            "versions": dict(self.versions),
            "network": self.network,
            "plan": self.plan,
        }
        return json.dumps(values, ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """ValueError of one line for a text that is no metadata of schema 1."""
        try:
            values = json.loads(text)
            if values["schema"] != SCHEMA_VERSION:
                raise ValueError(f"schema {values['schema']}, expected {SCHEMA_VERSION}")
            inputs, outputs = [
                tuple(TensorInfo(str(v["name"]), str(v["dtype"]), tuple(v["shape"])) for v in values[key])
                for key in ("inputs", "outputs")
            ]
            for info in (*inputs, *outputs):
                if not all(isinstance(dim, int | str) for dim in info.shape):
                    raise ValueError(f"{info.name} has the shape {info.shape}")
            texts = [str(values[key]) for key in ("device", "network", "plan")]
            return cls(inputs, outputs, dict(values["target"]), dict(values["versions"]), *texts)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"no metadata of a library: {type(error).__name__}: {error}") from error


def _tensor(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "dtype": info.dtype, "shape": list(info.shape)}


def read_metadata(library: Path) -> Metadata:
    """The metadata in a library's file, which is not loaded. InputError where there is none, or no library."""
    found = read_section(library, SECTION)
    if found is None:
        raise InputError(f"{library}: a library without the section {SECTION}: not written by rankc, or stripped of it")
    try:
        return Metadata.from_json(found.rstrip(b"\0").decode("ascii"))
    except ValueError as error:
        raise InputError(f"{library}: {error}") from error


def is_for_machine_of(library: Path, other: Path) -> bool:
    """True if two ELF files are for one architecture. InputError as in :func:`read_section`."""
    # class, byte order and e_machine
    (first, second) = [data[4:6] + data[18:20] for data in (_elf(library), _elf(other))]
    return first == second


def read_section(library: Path, name: str) -> bytes | None:
    """Content of a section of an ELF file (System V ABI, chapter 4); None where it has no such section.

    InputError for a file that cannot be read or is no whole ELF file.
    """
    data = _elf(library)
    order, wide = "<>"[data[5] - 1], data[4] == 2
    try:
        # e_shoff lies behind e_phoff; e_shentsize, e_shnum and e_shstrndx end the header
        (table,) = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", data, 40 if wide else 32)
        size, count, names_at = struct.unpack_from(f"{order}HHH", data, 58 if wide else 46)
        if table + count * size > len(data):
            raise ValueError("it ends early")
        headers = []
        for index in range(count):
            at = table + index * size
            (name_at,) = struct.unpack_from(f"{order}I", data, at)
            # sh_offset and sh_size lie behind sh_addr
            offset, length = struct.unpack_from(f"{order}{'QQ' if wide else 'II'}", data, at + (24 if wide else 16))
            headers.append((name_at, offset, length))
        if not headers:
            return None
        names = headers[names_at][1]
        for name_at, offset, length in headers:
            begin = names + name_at
            if data[begin : data.index(b"\0", begin)].decode("ascii", "replace") == name:
                content = data[offset : offset + length]
                if len(content) != length:
                    raise ValueError("it ends early")
                return content
    except (struct.error, ValueError, IndexError) as error:
        raise InputError(f"{library}: a damaged library: its table of sections cannot be read") from error
    return None


def _elf(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if data[:4] != b"\x7fELF" or len(data) < 52 or data[4] not in (1, 2) or data[5] not in (1, 2):
        raise InputError(f"{path}: no shared library (ELF)")
    return data
