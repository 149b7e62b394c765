"""Runs an accelerator's model.so in a fresh process, the simulator as its driver."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.child_process import Failure, call
from codegen.tvm_build import Binary
from passes.errors import VerificationError

Array = NDArray[Any]


def run_library(
    binary: Binary,
    machine: str,
    options: Mapping[str, str],
    feeds: Sequence[Mapping[str, Array]],
    *,
    timeout_s: float | None = None,
) -> tuple[list[list[Array]], list[int]]:
    """Outputs of the library for each set of inputs, and the accelerator's cycles of each run.

    ``machine`` and ``options`` are those of :func:`accel_sim.spec_file.load_spec`. VerificationError where the library
    cannot be loaded, crashes, or refuses the inputs.
    """
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        arrays = {f"{run}/{i}": np.asarray(f[n]) for run, f in enumerate(feeds) for i, n in enumerate(binary.inputs)}
        np.savez(given, allow_pickle=False, **arrays)
        request = {
            "library": str(binary.library.absolute()),
            "machine": machine,
            "options": dict(options),
            "given": str(given),
            "made": str(made),
            "runs": len(feeds),
            "inputs": len(binary.inputs),
        }
        environment = {"TVM_USE_RUNTIME_LIB": "1", "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"}
        answer = call("codegen.asic_binary.check_child", request, environment=environment, timeout_s=timeout_s)
        if isinstance(answer, Failure):
            raise VerificationError(f"{binary.library.name}, run in a fresh process, {answer.reason}")
        with np.load(made, allow_pickle=False) as archive:
            outputs = [[archive[f"{run}/{i}"] for i in range(answer["outputs"])] for run in range(len(feeds))]
        return outputs, answer["cycles"]
