"""scikit-learn's handwritten digits as data for examples/digits.onnx.

    --calib examples/digits_data.py:calibration --eval examples/digits_data.py:evaluation
    --train examples/digits_data.py:train

1,797 images of 8x8 pixels (UCI, Alpaydin and Kaynak 1998), enlarged to 16x16 and scaled to 0..1. The split is fixed
and stratified: of each digit, the same permutation gives training, validation and test images. Calibration uses
training images, as training does; evaluation the test images, which training never sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INPUT = "image"
SIZE = 16
PARTS = {"train": 0.6, "val": 0.1, "test": 0.3}
_SPLIT_SEED = 20


def digits(part: str) -> tuple[Array, Array]:
    """Images (N, 1, 16, 16) float32 and labels (N,) int64 of "train", "val" or "test"."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rng = np.random.default_rng(_SPLIT_SEED)
    before = sum(share for name, share in PARTS.items() if list(PARTS).index(name) < list(PARTS).index(part))
    chosen = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(bunch.target == digit))
        start, stop = (round(len(order) * share) for share in (before, before + PARTS[part]))
        chosen.append(order[start:stop])
    index = rng.permutation(np.concatenate(chosen))
    small = bunch.images[index].astype(np.float32) / 16.0
    images = small.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)[:, None]
    return np.ascontiguousarray(images), bunch.target[index].astype(np.int64)


def calibration() -> Iterator[dict[str, Array]]:
    """The training images in batches, labels left out."""
    images, _ = digits("train")
    for start in range(0, len(images), 64):
        yield {INPUT: images[start : start + 64]}


def train() -> Iterator[dict[str, Array]]:
    """The training images and their labels in batches."""
    images, labels = digits("train")
    for start in range(0, len(images), 64):
        yield {INPUT: images[start : start + 64], "labels": labels[start : start + 64]}


def evaluation() -> Iterator[dict[str, Array]]:
    """The test images and their labels in batches."""
    images, labels = digits("test")
    for start in range(0, len(images), 64):
        yield {INPUT: images[start : start + 64], "labels": labels[start : start + 64]}
