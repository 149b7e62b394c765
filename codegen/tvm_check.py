"""Reloads a compiled network in a fresh process and compares it with onnxruntime on the file it was made from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.child_process import Child, Failure
from codegen.tvm_build import Binary
from passes.errors import VerificationError

Array = NDArray[Any]

_APART_BYTES = 1 << 28
"""From here on onnxruntime, too, runs in a process of its own: it holds all weights."""


@dataclass(frozen=True)
class Difference:
    """How far one set of outputs is from its reference, output by output, over ``samples`` runs.

    ``relative_l2s``: ||y - reference|| / ||reference|| over all samples; ``max_abss``: largest single differences.
    """

    relative_l2s: tuple[float, ...]
    max_abss: tuple[float, ...]
    samples: int

    @property
    def relative_l2(self) -> float:
        """Of the worst output."""
        return max(self.relative_l2s, default=0.0)

    @property
    def max_abs(self) -> float:
        """Of the worst output."""
        return max(self.max_abss, default=0.0)

    def within(self, relative_l2: float, max_abs: float) -> bool:
        """True if each output keeps one of the limits; a relative one says nothing of an output that is almost 0."""
        pairs = zip(self.relative_l2s, self.max_abss, strict=True)
        return all(relative <= relative_l2 or absolute <= max_abs for relative, absolute in pairs)


def difference(results: Sequence[Sequence[Array]], references: Sequence[Sequence[Array]]) -> Difference:
    """Compares runs x outputs. VerificationError where shapes differ or a result is not finite and its reference is."""
    if not references or len(results) != len(references):
        raise VerificationError(f"{len(results)} results to compare with {len(references)} references")
    outputs = len(references[0])
    squares, norms, worst = np.zeros(outputs), np.zeros(outputs), np.zeros(outputs)
    for run, (result, reference) in enumerate(zip(results, references, strict=True)):
        if len(result) != outputs:
            raise VerificationError(f"run {run} has {len(result)} outputs, expected {outputs}")
        for index, (have, want) in enumerate(zip(result, reference, strict=True)):
            if have.shape != want.shape:
                raise VerificationError(f"output {index} of run {run} has shape {have.shape}, expected {want.shape}")
            delta = have.astype(np.float64) - want.astype(np.float64)
            if np.isfinite(want).all() and not np.isfinite(delta).all():
                raise VerificationError(f"output {index} of run {run} is not finite")
            squares[index] += float(np.sum(delta**2))
            norms[index] += float(np.sum(want.astype(np.float64) ** 2))
            worst[index] = max(worst[index], np.max(np.abs(delta), initial=0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(squares == 0, 0.0, np.sqrt(squares / norms))
    return Difference(tuple(relative.tolist()), tuple(worst.tolist()), len(references))


def run_binary(
    binary: Binary, feeds: Sequence[Mapping[str, Array]], *, timeout_s: float | None = None
) -> list[list[Array]]:
    """Outputs of the library for each set of inputs, from a fresh process that loads TVM's runtime alone.

    VerificationError where it cannot be loaded, crashes, or refuses the inputs.
    """
    return run_in_child(runner("codegen.tvm_check_child"), binary, feeds, {}, timeout_s)[0]


def runner(module: str) -> Child:
    """A process of ``module`` for one :func:`run_in_child`."""
    return Child(module, {"TVM_USE_RUNTIME_LIB": "1", "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"})


def run_in_child(
    child: Child,
    binary: Binary,
    feeds: Sequence[Mapping[str, Array]],
    further: Mapping[str, Any],
    timeout_s: float | None,
) -> tuple[list[list[Array]], dict[str, Any]]:
    """Outputs of the library for each set of inputs, run by a :func:`runner`, and that process's answer.

    ``further`` is added to the request. VerificationError where the process fails.
    """
    with child, tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        arrays = {
            f"{run}/{i}": np.asarray(feed[name])
            for run, feed in enumerate(feeds)
            for i, name in enumerate(binary.inputs)
        }
        np.savez(given, allow_pickle=False, **arrays)
        request = {
            "library": str(binary.library.absolute()),
            "given": str(given),
            "made": str(made),
            "runs": len(feeds),
            "inputs": len(binary.inputs),
            **further,
        }
        answer = child.call(request, timeout_s=timeout_s)
        if isinstance(answer, Failure):
            raise VerificationError(f"{binary.library.name}, run in a fresh process, {answer.reason}")
        with np.load(made, allow_pickle=False) as archive:
            outputs = [[archive[f"{run}/{i}"] for i in range(answer["outputs"])] for run in range(len(feeds))]
        return outputs, answer


def check_binary(
    binary: Binary, model: Path, feeds: Sequence[Mapping[str, Array]], *, timeout_s: float | None = None
) -> Difference:
    """Runs ``binary`` in a fresh process and ``model``, read from its file, in onnxruntime; compares all outputs."""
    from codegen.onnx_runs import run_file

    stored = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    # the outputs of a library are the file's, in its order
    references = run_file(model, feeds, apart=stored >= _APART_BYTES)
    return difference(run_binary(binary, feeds, timeout_s=timeout_s), references)
