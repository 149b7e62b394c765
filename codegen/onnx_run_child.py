"""The running process: ``python -m codegen.onnx_run_child REQUEST ANSWER``; see :mod:`codegen.onnx_runs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from codegen.child_process import end_with_parent


def main(request_path: str, answer_path: str) -> None:
    end_with_parent()
    request = json.loads(Path(request_path).read_bytes())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    results = {}
    with np.load(request["given"], allow_pickle=False) as given:
        for run in range(request["runs"]):
            feeds = {name: given[f"{run}/{i}"] for i, name in enumerate(request["names"])}
            results.update({f"{run}/{i}": np.asarray(out) for i, out in enumerate(session.run(None, feeds))})
    np.savez(request["made"], allow_pickle=False, **results)
    outputs = len(session.get_outputs())
    Path(answer_path).write_text(json.dumps({"outputs": outputs}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
