"""Runs libraries on this machine's GPU in a fresh process: what they compute, and how long they take in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.child_process import Failure, call
from passes.errors import VerificationError

Array = NDArray[Any]


def run_on_gpu(
    libraries: Mapping[str, Path],
    feeds: Sequence[Mapping[str, Array]],
    *,
    blocks: int,
    calls: int,
    timeout_s: float | None = None,
) -> tuple[dict[str, list[list[Array]]], dict[str, NDArray[np.float64]]]:
    """Outputs of each library on each of ``feeds``, and seconds of single calls on the first, (blocks, calls) each.

    Libraries take turns, so block i of one was measured beside block i of another; a call ends when the GPU is done,
    and copies of inputs and outputs are not in it. VerificationError where a library cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "made.npz"
        names = list(feeds[0])
        arrays = {
            f"{run}/{i}": np.asarray(feed[name]) for run, feed in enumerate(feeds) for i, name in enumerate(names)
        }
        np.savez(given, allow_pickle=False, **arrays)
        request = {
            "libraries": [str(path.absolute()) for path in libraries.values()],
            "given": str(given),
            "made": str(made),
            "names": names,
            "runs": len(feeds),
            "blocks": blocks,
            "calls": calls,
        }
        environment = {"TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"}
        answer = call("codegen.cuda_run_child", request, environment=environment, timeout_s=timeout_s)
        if isinstance(answer, Failure) or "reason" in answer:
            reason = answer.reason if isinstance(answer, Failure) else answer["reason"]
            raise VerificationError(f"{', '.join(path.name for path in libraries.values())} on the GPU: {reason}")
        with np.load(made, allow_pickle=False) as archive:
            outputs = {
                name: [[archive[f"{k}/{run}/{i}"] for i in range(answer["outputs"][k])] for run in range(len(feeds))]
                for k, name in enumerate(libraries)
            }
            return outputs, {name: archive[f"{k}/seconds"] for k, name in enumerate(libraries)}
