"""What has no fixed size in a container - names, lists of names, blobs - one after the other, little endian.

A text is a 32-bit count of bytes and as many bytes of UTF-8; a list is a 32-bit count and its entries; a blob is a
64-bit count and its bytes.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from accel_sim.program.errors import ProgramError


class Writer:
    """Appends values to a section; ``index`` is the entry that complaints name."""

    def __init__(self, section: str) -> None:
        self.index = 0
        self._section = section
        self._chunks: list[bytes] = []

    def data(self) -> bytes:
        return b"".join(self._chunks)

    def byte(self, name: str, value: int, largest: int) -> None:
        self._integer(name, value, "<B", 0, largest)

    def word(self, name: str, value: int) -> None:
        self._integer(name, value, "<i", -(1 << 31), (1 << 31) - 1)

    def long(self, name: str, value: int) -> None:
        self._integer(name, value, "<q", -(1 << 63), (1 << 63) - 1)

    def count(self, name: str, value: int) -> None:
        self._integer(f"length of {name}", value, "<I", 0, (1 << 32) - 1)

    def real(self, name: str, value: float) -> None:
        with np.errstate(over="ignore"):
            single = np.float32(value)
        if not np.isfinite(single) or float(single) != value:
            raise self._error(f"{name} is {value!r}; expected a finite number that float32 holds exactly")
        self._chunks.append(struct.pack("<f", single))

    def text(self, name: str, value: str) -> None:
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._error(f"{name} {value!r} is no text that UTF-8 holds") from error
        self.count(name, len(data))
        self._chunks.append(data)

    def texts(self, name: str, values: tuple[str, ...]) -> None:
        self.count(name, len(values))
        for value in values:
            self.text(name, value)

    def blob(self, name: str, value: bytes) -> None:
        self.long(f"length of {name}", len(value))
        self._chunks.append(bytes(value))

    def _integer(self, name: str, value: Any, form: str, smallest: int, largest: int) -> None:
        if not isinstance(value, int | np.integer) or not smallest <= value <= largest:
            raise self._error(f"{name} is {value!r}; expected a whole number of {smallest} to {largest}")
        self._chunks.append(struct.pack(form, int(value)))

    def _error(self, what: str) -> ProgramError:
        return ProgramError(what, self._section, self.index)


class Reader:
    """Takes values off a section; every length is compared with the bytes that are left first."""

    def __init__(self, data: memoryview, section: str) -> None:
        self.index = 0
        self._section = section
        self._data = data
        self._at = 0

    def end(self) -> None:
        """Complains about bytes behind the last entry."""
        if self._at != len(self._data):
            raise ProgramError(f"{len(self._data) - self._at} bytes behind the last entry", self._section)

    def byte(self, name: str, largest: int) -> int:
        value = self._take(1, name)[0]
        if value > largest:
            raise self._error(f"{name} is {value}; expected 0 to {largest}")
        return value

    def word(self) -> int:
        return int.from_bytes(self._take(4, "a number"), "little", signed=True)

    def long(self) -> int:
        return int.from_bytes(self._take(8, "a number"), "little", signed=True)

    def count(self, name: str, entry_bytes: int) -> int:
        """A count of entries that take at least ``entry_bytes`` each."""
        value = int.from_bytes(self._take(4, f"length of {name}"), "little")
        if value * entry_bytes > len(self._data) - self._at:
            raise self._error(f"length of {name} is {value}; {len(self._data) - self._at} bytes are left")
        return value

    def real(self, name: str) -> float:
        (value,) = struct.unpack("<f", self._take(4, name))
        if not np.isfinite(value):
            raise self._error(f"{name} is {value}; expected a finite number")
        return float(value)

    def text(self, name: str) -> str:
        data = bytes(self._take(self.count(name, 1), name))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{name} is no UTF-8: {error.reason} at byte {error.start}") from error

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self.text(name) for _ in range(self.count(name, 4)))

    def blob(self, name: str) -> bytes:
        size = self.long()
        if not 0 <= size <= len(self._data) - self._at:
            raise self._error(f"length of {name} is {size}; {len(self._data) - self._at} bytes are left")
        return bytes(self._take(size, name))

    def _take(self, size: int, name: str) -> memoryview:
        if size > len(self._data) - self._at:
            raise self._error(f"{name} takes {size} bytes; {len(self._data) - self._at} are left")
        self._at += size
        return self._data[self._at - size : self._at]

    def _error(self, what: str) -> ProgramError:
        return ProgramError(what, self._section, self.index)
