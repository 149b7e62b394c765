"""The running process of :mod:`codegen.cuda_run`: ``python -m codegen.cuda_run_child REQUEST ANSWER``.

It loads what a deployment has: NumPy and TVM's runtime.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegen.child_process import reply
from codegen.runner.library import Library
from passes.errors import RankcError


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    libraries = [Library(Path(path)) for path in request["libraries"]]
    results: dict[str, Any] = {}
    counts = []
    with np.load(request["given"], allow_pickle=False) as given:
        feeds = [
            {name: given[f"{run}/{i}"] for i, name in enumerate(request["names"])} for run in range(request["runs"])
        ]
    for index, library in enumerate(libraries):
        for run, feed in enumerate(feeds):
            made = list(library.run(feed).values())
            results |= {f"{index}/{run}/{i}": value for i, value in enumerate(made)}
        counts.append(len(library.metadata.outputs))
    calls = [library.bound(feeds[0]) for library in libraries]
    seconds = np.zeros((len(libraries), request["blocks"], request["calls"]))
    for block in range(request["blocks"]):
        for index, one in enumerate(calls):
            one()  # the others' weights leave the cache
            for position in range(request["calls"]):
                begin = time.perf_counter_ns()
                one()
                seconds[index, block, position] = (time.perf_counter_ns() - begin) * 1e-9
    results |= {f"{index}/seconds": rows for index, rows in enumerate(seconds)}
    np.savez(request["made"], allow_pickle=False, **results)
    return {"outputs": counts}


if __name__ == "__main__":
    reply(_run, RankcError)
