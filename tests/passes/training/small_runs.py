"""Runs small enough for tests, made the same way in every process that makes one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from passes.training.augment import Batch
from passes.training.data import TrainingSet
from passes.training.objective import scores_of
from passes.training.options import TrainingOptions

CLASSES = 3


def images(count: int = 120, size: int = 8, seed: int = 0) -> TrainingSet:
    """Noise with one brighter channel, which is the class."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, CLASSES, size, size)).astype(np.float32)
    y = rng.integers(0, CLASSES, count)
    x[np.arange(count), y] += 0.7
    return TrainingSet.of({"x": x}, y)


def normed_network(seed: int = 0) -> nn.Module:
    """With BatchNorm and dropout: statistics and random draws in every step."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(CLASSES, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip


def plain_network(seed: int = 0) -> nn.Module:
    """Without either: the gradient of a batch is the mean of its samples' gradients."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(CLASSES, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)
    )


class ScaledCrossEntropy(nn.Module):
    """Cross entropy of scores times a trained scale, which training so far has annealed; a module with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> torch.Tensor:
        scores = scores_of(network, batch) * self.scale
        return F.cross_entropy(scores, batch["labels"]) + 0.1 * (epoch / epochs) * self.scale.square().sum()


def options(**changed: Any) -> TrainingOptions:
    """Three epochs of three or four steps in float32."""
    given: dict[str, Any] = {
        "epochs": 3, "batch": 30, "lr": 0.05, "augment": "crop_flip", "held_out": 0.2, "precision": "fp32", **changed,
    }  # fmt: skip
    return TrainingOptions(**given)


EVERYTHING: dict[str, Any] = {"optimizer": "adam", "lr": 0.01, "clip_norm": 1.0, "ema": 0.8}
"""A run with all the state there is: moments, a mean of the weights, an objective's parameter."""
