"""The running process: ``python -m codegen.onnx_run_child REQUEST ANSWER``; see :mod:`codegen.onnx_runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegen.child_process import reply


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    from codegen.onnx_runs import session as opened

    session = opened(Path(request["model"]))
    results = {}
    with np.load(request["given"], allow_pickle=False) as given:
        for run in range(request["runs"]):
            feeds = {name: given[f"{run}/{i}"] for i, name in enumerate(request["names"])}
            results.update({f"{run}/{i}": np.asarray(out) for i, out in enumerate(session.run(None, feeds))})
    np.savez(request["made"], allow_pickle=False, **results)
    return {"outputs": len(session.get_outputs())}


if __name__ == "__main__":
    reply(_run)
