"""A child process of the farm: started apart, heard and told in lines of JSON, and gone when it should be."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]

RUNTIME_ONLY = {"TVM_USE_RUNTIME_LIB": "1", "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"}
"""Loads TVM without its compiler: 0.4 s instead of 0.7, 80 MB instead of 190."""


class ChildProcess:
    """``python -m module ARGUMENT`` in a process group of its own, which is killed as a whole.

    It ends with this process as well, if it calls :func:`codegen.child_process.end_with_parent`: the kernel then
    watches the thread that started it. ``log`` is what it writes to stderr, a file that is gone after :meth:`kill`.
    """

    def __init__(self, module: str, argument: str, environment: Mapping[str, str]) -> None:
        self.module = module
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # No name, so nothing is left of it.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._data = bytearray()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, argument],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Readable when :meth:`received` has something to say."""
        return self._stdout.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """A message to a process that has ended is lost; :meth:`received` and :meth:`ended` tell."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(dict(message)).encode() + b"\n")
            self._stdin.flush()

    def received(self) -> list[dict[str, Any]]:
        """The messages that have come since, without waiting."""
        while True:
            try:
                data = os.read(self._stdout.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not data:
                break
            self._data += data
        *lines, rest = bytes(self._data).split(b"\n")
        self._data = bytearray(rest)
        return [json.loads(line) for line in lines]

    def first(self, timeout_s: float) -> dict[str, Any] | None:
        """Waits for a message; None where the process ends or ``timeout_s`` pass without one."""
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            select.select([self._stdout], [], [], left)
            messages = self.received()
            if messages:
                return messages[0]
            if self.ended() is not None:
                return None
        return None

    def ended(self) -> str | None:
        """Why the process is no more, as a few words; None while it lives."""
        code = self._process.poll()
        if code is None:
            return None
        if code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        lines = self.log().splitlines()
        return f"ended with {code}" + (f": {lines[-1][:300]}" if lines else "")

    def log(self) -> str:
        """The end of what it wrote to stderr."""
        if self._log.closed:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - 4000, 0))
        return self._log.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """Ends it and all that it started, and waits until it is gone."""
        # Also where the leader is gone: its group lives as long as one of the processes in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._log.close()
