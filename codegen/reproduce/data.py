"""The data of the experiments as sources that ``rankc lower`` and ``rankc train`` read: loader scripts.

A script is written into the folder of the results, because a source is a file. Training, calibration and held-out
samples come from the training set alone; the test set is read here, once, when every network is done.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codegen.bench.benchmark import existing
from codegen.bench.cifar10 import TEST, images
from passes.core.site import Array
from passes.files import write_text

TRAINING_FILES = tuple(f"train_{number}.npz" for number in range(4))

_SCRIPT = '''"""{what}; written by rankc reproduce."""

from pathlib import Path

from codegen.reproduce.data import {source}


def training():
    """All training samples, input by name and labels."""
    for x, y in {source}(Path({folder!r})).training():
        yield {{{input!r}: x, "labels": y}}
'''


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10 as arrays in ``folder``/cifar10: 50,000 training images in four files, and the test images."""

    folder: Path

    def training(self) -> list[tuple[Array, Array]]:
        """Images (n, 3, 32, 32) float32 and labels (n,) of each file. InputError where one is missing."""
        return [images(self.folder, file, 0, None) for file in TRAINING_FILES]

    def test(self) -> tuple[Array, Array]:
        """The same of the test set."""
        return images(self.folder, TEST, 0, None)

    def sha256(self) -> str:
        """Of the files, test images included. InputError where one is missing."""
        state = hashlib.sha256()
        for file in (*TRAINING_FILES, TEST):
            with existing(self.folder / "cifar10" / file, "--data", "CIFAR-10 as arrays x and y").open("rb") as opened:
                state.update(hashlib.file_digest(opened, "sha256").digest())
        return state.hexdigest()


@dataclass(frozen=True)
class Synthetic:
    """A few hundred images of 8x8 pixels in four classes, for trying the experiments' machinery: noise with a blob."""

    folder: Path
    samples: int = 480

    def training(self) -> list[tuple[Array, Array]]:
        return [self._drawn(0)]

    def test(self) -> tuple[Array, Array]:
        return self._drawn(1)

    def sha256(self) -> str:
        return hashlib.sha256(b"".join(part.tobytes() for seed in (0, 1) for part in self._drawn(seed))).hexdigest()

    def _drawn(self, seed: int) -> tuple[Array, Array]:
        rng = np.random.default_rng([5, seed])
        labels = rng.integers(0, 4, self.samples)
        x = rng.standard_normal((self.samples, 3, 8, 8)).astype(np.float32)
        for image, label in zip(x, labels, strict=True):
            top, left = 4 * (label // 2), 4 * (label % 2)
            image[:, top : top + 4, left : left + 4] += 0.6
        return x, labels.astype(np.int64)


Data = Cifar10 | Synthetic
SOURCES: dict[str, type[Cifar10] | type[Synthetic]] = {"cifar10": Cifar10, "synthetic": Synthetic}


def loader(data: Data, input: str, folder: Path) -> str:
    """Writes the script that loads the training set for a network with this input; returns the source it is.

    Script and source name absolute paths: they work from any working directory.
    """
    folder = Path(os.path.abspath(folder))
    name = "".join(c if c.isalnum() else "_" for c in input)
    path = folder / f"{type(data).__name__.lower()}_{name}.py"
    text = _SCRIPT.format(
        what=f"Training data for the input {input!r}",
        source=type(data).__name__,
        folder=os.path.abspath(data.folder),
        input=input,
    )
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return f"{path}:training"
