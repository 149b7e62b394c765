"""CIFAR-10 as data for the CIFAR networks, from a folder of .npz files.

    --train examples/cifar10.py:train --eval examples/cifar10.py:evaluation --calib examples/cifar10.py:calibration

RANKC_CIFAR10 names the folder; without it, it is shared/data/cifar10 beside the checkout. It holds train_*.npz
(50,000 images together) and test.npz (10,000), each with x (N, 32, 32, 3) uint8 and y (N,). Images come out as
(pixel / 255 - mean) / std, channels first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INPUT = "input"
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
CALIBRATION_IMAGES = 1024
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def train() -> Iterator[dict[str, Array]]:
    """The training images and their labels, a file at a time."""
    files = sorted(_folder().glob("train_*.npz"))
    if not files:
        raise FileNotFoundError(f"no train_*.npz in {_folder()}")
    for path in files:
        yield _images(path)


def calibration() -> Iterator[dict[str, Array]]:
    """The first training images, labels left out."""
    yield {INPUT: _images(_folder() / "train_0.npz", CALIBRATION_IMAGES)[INPUT]}


def evaluation() -> Iterator[dict[str, Array]]:
    """The test images and their labels, which training never sees."""
    yield _images(_folder() / "test.npz")


def augment(batch: dict[str, Any], generator: Any) -> dict[str, Any]:
    """Training images shifted by up to four pixels, zeros moving in, and mirrored or not."""
    from passes.training.augment import crop_flip

    return crop_flip(batch, generator)


def _folder() -> Path:
    return Path(os.environ.get("RANKC_CIFAR10", FOLDER))


def _images(path: Path, count: int | None = None) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        pixels, labels = archive["x"][:count], archive["y"][:count]
    scaled = (pixels.astype(np.float32) / 255 - _MEAN) / _STD
    return {INPUT: np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), "labels": labels.astype(np.int64)}
