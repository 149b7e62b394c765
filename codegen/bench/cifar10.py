"""CIFAR-10 as the benchmarks' networks want it, and their accuracy on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.bench.benchmark import existing
from passes.errors import InputError, first_line

Array = NDArray[Any]

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
"""What the networks were trained with; the README beside them says so."""

CALIBRATION, TEST = "train_0.npz", "test.npz"


def images(folder: Path, file: str, start: int, stop: int | None) -> tuple[Array, Array]:
    """Images ``start`` to ``stop`` of a file in ``folder``/cifar10: (n, 3, 32, 32) float32, and labels (n,).

    Raises InputError where the file is missing, or is not what it is taken for.
    """
    path = existing(folder / "cifar10" / file, "--data", "CIFAR-10 as arrays x (N, 32, 32, 3) uint8 and y (N,)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            pixels, labels = archive["x"][start:stop], archive["y"][start:stop]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    if pixels.ndim != 4 or pixels.shape[1:] != (32, 32, 3) or pixels.dtype != np.uint8 or not len(pixels):
        raise InputError(f"{path}: x is {pixels.dtype} {pixels.shape}, expected uint8 (N, 32, 32, 3)")
    scaled = (pixels.astype(np.float32) / 255 - _MEAN) / _STD
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), labels.astype(np.int64)


def top1(model: Path, x: Array, y: Array, batch: int = 250, int8: bool = False) -> float:
    """Top-1 accuracy of a written network, run by onnxruntime; that of an ``int8`` one by exact integer kernels."""
    import onnxruntime

    from codegen.quantized.onnx_network import integer_options

    options = integer_options(signed=True, threads=0) if int8 else onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = 0
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        right += int((session.run(None, {name: x[part]})[0].argmax(axis=1) == y[part]).sum())
    return right / len(x)
