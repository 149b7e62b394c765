"""Runs of ONNX files in onnxruntime; those of large networks in a process of their own, which holds the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from codegen.child_process import Failure, call
from passes.errors import VerificationError
from passes.onnx_graph import OnnxGraph
from passes.onnx_runtime import exact_session

Array = NDArray[Any]


def session(path: Path, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """A session on the file, in this process; without ``options`` one whose 8-bit sums are exact where that can be."""
    if options is not None:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return exact_session(str(path), options)


def run_file(
    path: Path,
    feeds: Sequence[Mapping[str, Array]],
    *,
    apart: bool = False,
    options: onnxruntime.SessionOptions | None = None,
) -> list[list[Array]]:
    """All outputs of the file for each set of inputs. ``apart``: in a fresh process, which takes no ``options``.

    VerificationError where that process fails; in this process, what onnxruntime raises.
    """
    if not apart:
        running = session(path, options)
        return [[np.asarray(out) for out in running.run(None, dict(feed))] for feed in feeds]
    names = list(feeds[0]) if feeds else []
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        arrays = {
            f"{run}/{i}": np.asarray(feed[name]) for run, feed in enumerate(feeds) for i, name in enumerate(names)
        }
        np.savez(given, allow_pickle=False, **arrays)
        request = {
            "model": str(path.absolute()), "given": str(given), "made": str(made), "names": names, "runs": len(feeds)
        }  # fmt: skip
        answer = call("codegen.onnx_run_child", request)
        if isinstance(answer, Failure):
            raise VerificationError(f"{path.name}, run by onnxruntime in a fresh process, {answer.reason}")
        with np.load(made, allow_pickle=False) as archive:
            return [[archive[f"{run}/{i}"] for i in range(answer["outputs"])] for run in range(len(feeds))]


def run_network(network: OnnxGraph, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    """Outputs of a network as it is in memory; of a large one, by way of a temporary file and a fresh process."""
    if not network.is_large:
        return [network.run(feed) for feed in feeds]
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        return run_file(network.save(Path(folder) / "model.onnx")[0], feeds, apart=True)
