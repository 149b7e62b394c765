"""The child's side of :class:`codegen.farm.process.ChildProcess`: one line of JSON in, one line of JSON out."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from codegen.child_process import end_with_parent

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def answer_all(start: Callable[[], Handler]) -> None:
    """Says that it is ready once ``start`` has loaded what it needs, then answers until nothing is left to answer.

    An answer carries the ``id`` of its request; whatever a request raises becomes its ``error``, in one line. What
    native code prints goes to stderr.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    handler = start()
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handler(request)
        except Exception as error:  # whatever the compiler or the other side raises: the parent hears of it
            answer = {"error": one_line(error)}
        answers.write(json.dumps({"id": request["id"], **answer}) + "\n")


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TVM's errors begin with the frames that they came through and end with what is wrong.
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:300]
