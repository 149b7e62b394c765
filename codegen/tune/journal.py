"""A file of lines that processes share: it grows by whole lines under a lock; a last line that is not whole is mended.

A line is written by one call and forced to the disk before the lock is let go. A process that is killed leaves at most
one unfinished line, which the next one to come cuts off; as it holds the lock, nobody is still writing it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from codegen.tune.record import SCHEMA, Header, begins_header, from_line
from passes.errors import InputError

_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Journal:
    """The lines behind the header of ``path``. ``warn`` is told of an end that was cut off.

    ``position`` counts the bytes that were read, ``lines`` the lines, the header included.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._seen: tuple[int, int, int] | None = None
        self._id = ""
        self._file = -1
        self.position = self.lines = 0

    @property
    def unchanged(self) -> bool:
        """True where there is nothing that was not read; one look at the file's size and time."""
        try:
            return _stamp(os.stat(self.path)) == self._seen
        except FileNotFoundError:
            return True
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error

    @contextmanager
    def locked(self, *, write: bool) -> Iterator[None]:
        """The file is nobody else's meanwhile. Created with ``write``; InputError where that cannot be."""
        try:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._file < 0:
                file = self._open(write)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    # Where it was replaced while we waited, the name stands for another file.
                    if self.path.exists() and os.path.samestat(os.fstat(file), os.stat(self.path)):
                        self._file = file
                        yield
                        self._seen = _stamp(os.fstat(file))
                        return
                finally:
                    self._file = -1
                    os.close(file)  # which unlocks it
        except OSError as error:
            raise InputError(f"{self.path}: cannot be {'written' if write else 'read'}: {error.strerror}") from error

    def fresh(self) -> bool:
        """Within :meth:`locked`: True where the file is another one than was read, and is to be read from its start."""
        size = os.fstat(self._file).st_size
        start = _read(self._file, 0, min(size, 4096))
        line, newline, _ = start.partition(b"\n")
        if not newline:
            if not begins_header(start):
                raise self._foreign()
            if not self._writable:
                self._id, self.position, self.lines = "", len(start), 0
                return True
            self._truncate(0)
            self._write(Header(SCHEMA, uuid.uuid4().hex).to_line())
            return self.fresh()
        try:
            header = Header.from_line(line)
        except ValueError as error:
            raise self._foreign() from error
        if header.schema != SCHEMA:
            raise InputError(f"{self.path}: is a tuning database of schema {header.schema}, this rankc reads {SCHEMA}")
        if header.id == self._id and size >= self.position:
            return False
        self._id, self.position, self.lines = header.id, len(line) + 1, 1
        return True

    def unread(self) -> Iterator[bytes]:
        """Within :meth:`locked`, after :meth:`fresh`: the whole lines that were not read, without their newlines."""
        data = _read(self._file, self.position, os.fstat(self._file).st_size)
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines(keepends=True):
            self.position += len(line)
            self.lines += 1
            yield line[:-1]
        if whole == len(data):
            return
        tail = data[whole:]
        try:
            from_line(tail)
        except ValueError:
            self._warn(f"{self.path}: {len(tail)} bytes of an unfinished record at its end were cut off")
            self._truncate(self.position)
        else:
            self._write(b"\n")
            self.position += len(tail) + 1
            self.lines += 1
            yield tail

    def append(self, data: bytes) -> None:
        """Within :meth:`locked`, when everything was read: whole lines, on the disk when this returns."""
        before = os.fstat(self._file).st_size
        try:
            self._write(data)
        except OSError:
            self._truncate(before)  # a full disk keeps no half of a record
            raise
        self.position += len(data)
        self.lines += data.count(b"\n")

    def replace(self, data: bytes) -> None:
        """Within :meth:`locked`: puts another file, of these lines, under the same name, once it is whole.

        Whoever waits for the lock of the old one finds the new one there.
        """
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("wb") as file:
            file.write(Header(SCHEMA, uuid.uuid4().hex).to_line() + data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def _open(self, write: bool) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(self.path, flags | (os.O_CREAT if write else 0), 0o644)
        except OSError as error:
            if write or error.errno not in _NOT_OURS:
                raise
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def _write(self, data: bytes) -> None:
        if self._writable:
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes could be written")
            os.fsync(self._file)

    def _truncate(self, size: int) -> None:
        if self._writable:
            os.ftruncate(self._file, size)

    @property
    def _writable(self) -> bool:
        return fcntl.fcntl(self._file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR

    def _foreign(self) -> InputError:
        return InputError(
            f"{self.path}: is no tuning database of rankc (its first line does not say so); give another file"
        )


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(file: int, start: int, end: int) -> bytes:
    parts = []
    while start < end and (part := os.pread(file, end - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)
