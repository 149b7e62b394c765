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

_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Failure:
    """Why there is no answer, as a sentence; ``log`` is the tail of what the process wrote."""

    reason: str
    log: str


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment in which a fresh one finds this checkout first, with ``more``."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def call(
    module: str,
    request: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any] | Failure:
    """Runs ``python -m module REQUEST ANSWER`` on two JSON files and returns the answer.

    The process ends with this one: whatever is raised here, an interrupt included, kills it first.
    """
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(dict(request)), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", module, str(asked), str(answered)],
                env=child_environment(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return Failure(f"took longer than {timeout_s:g} s", _tail(error.stdout or b""))
        log = _tail(done.stdout)
        if done.returncode < 0:
            return Failure(f"crashed ({signal.Signals(-done.returncode).name})", log)
        if done.returncode > 0 or not answered.is_file():
            last = log.splitlines()[-1] if log else "no message"
            return Failure(f"failed: {last}", log)
        answer: dict[str, Any] = json.loads(answered.read_bytes())
        return answer


def reply(
    work: Callable[[dict[str, Any]], Mapping[str, Any]],
    refused: type[Exception] | tuple[type[Exception], ...] = (),
) -> None:
    """What a module that :func:`call` runs does as its program: ``work`` makes the answer of the request.

    What is raised of ``refused`` is an answer too, {"reason": its message}; other errors end the process.
    """
    end_with_parent()
    asked, answered = map(Path, sys.argv[1:])
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
