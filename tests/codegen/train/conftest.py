"""A small network and data for training runs, as a user would bring them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

NETWORK = """
import torch
from torch import nn

def network():
    def block(i, o, stride):
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    parts = [*block(1, 12, 1), *block(12, 16, 2), *block(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(16, 4))

def broken():
    raise RuntimeError("no such luck")

def wrong():
    return 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four directions of stripes in noise, 8x8: 160 images that any network learns in a few epochs."""
    rng = np.random.default_rng(5)
    labels = np.arange(160) % 4
    y, x = np.mgrid[:8, :8]
    waves = np.stack([np.sin(np.pi * k / 2) for k in (x, y, x + y, x - y)])
    images = waves[labels] + 0.3 * rng.standard_normal((160, 8, 8))
    path = tmp_path / "data.npz"
    np.savez(path, image=images[:, None].astype(np.float32), labels=labels)
    return path


@pytest.fixture
def arguments(script: Path, data: Path) -> Callable[..., list[str]]:
    """``train`` on both, with options of one's own."""

    def of(method: str, output: Path, *options: str) -> list[str]:
        given = ["--method", method, "--network", f"{script}:network", "--train", str(data), "--eval", str(data)]
        recipe = ["--batch", "32", "--held-out", "0.2", "--epochs", "2", "--precision", "fp32", "--device", "cpu"]
        return ["train", *given, *recipe, "-o", str(output), *options]

    return of
