"""Work done in a fresh Python process, so that a crash in native code costs one result and not the run."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codegen.heap import collect_seldom

_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).resolve().parents[1]
_GO = b"go\n"


@dataclass(frozen=True)
class Failure:
    """Why there is no answer, as a sentence; ``log`` is the tail of what the process wrote."""

    reason: str
    log: str


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment in which a fresh one finds this checkout first, with ``more``."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


class Child:
    """A fresh process that runs ``python -m module``, which imports what it needs and waits for its one request.

    A context: the process ends with it, whatever is raised in there, an interrupt included. The thread that made it
    must outlive it.
    """

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rankc-")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(self._asked), str(self._answered)],
                env=child_environment(environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except BaseException:
            self._folder.cleanup()
            raise

    @property
    def _asked(self) -> Path:
        return Path(self._folder.name) / "request.json"

    @property
    def _answered(self) -> Path:
        return Path(self._folder.name) / "answer.json"

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()
        self._folder.cleanup()

    def call(self, request: Mapping[str, Any], *, timeout_s: float | None = None) -> dict[str, Any] | Failure:
        """The answer to the request; both are JSON."""
        self._asked.write_text(json.dumps(dict(request)), encoding="utf-8")
        try:
            output, _ = self._process.communicate(_GO, timeout_s)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            return Failure(f"took longer than {timeout_s:g} s", _tail(error.stdout or b""))
        log, code = _tail(output), self._process.returncode
        if code < 0:
            return Failure(f"crashed ({signal.Signals(-code).name})", log)
        if code > 0 or not self._answered.is_file():
            last = log.splitlines()[-1] if log else "no message"
            return Failure(f"failed: {last}", log)
        answer: dict[str, Any] = json.loads(self._answered.read_bytes())
        return answer


def call(
    module: str,
    request: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any] | Failure:
    """The answer of a :class:`Child` that is made for this request alone."""
    with Child(module, environment) as child:
        return child.call(request, timeout_s=timeout_s)


def reply(
    work: Callable[[dict[str, Any]], Mapping[str, Any]],
    refused: type[Exception] | tuple[type[Exception], ...] = (),
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """What a module that a :class:`Child` runs does as its program: ``work`` makes the answer of the request.

    ``prepare`` is called before there is a request: slow imports. What is raised of ``refused`` is an answer too,
    {"reason": its message}; other errors end the process.
    """
    end_with_parent()
    collect_seldom()
    asked, answered = map(Path, sys.argv[1:])
    prepare()
    if sys.stdin.buffer.readline() != _GO:
        return  # the parent has no request after all
    with open(os.devnull, "rb") as nothing:  # for what this process starts
        os.dup2(nothing.fileno(), 0)
    request: dict[str, Any] = json.loads(asked.read_bytes())
    try:
        answer = work(request)
    except refused as error:
        answer = {"reason": str(error)}
    answered.write_text(json.dumps(dict(answer)), encoding="utf-8")


def end_with_parent() -> None:
    """Called first in a child: it is killed when its parent dies, so it never writes into a later run.

    Only Linux can do that; elsewhere an orphan works on to its end.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGKILL)


def _tail(output: bytes) -> str:
    return output.decode(errors="replace").strip()[-4000:]
