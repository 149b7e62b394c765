"""What a step of training minimises."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from passes.training.augment import Batch
from passes.training.data import LABELS

Tensor = torch.Tensor


class Objective(Protocol):
    """A loss of a network on a batch.

    It may be a ``torch.nn.Module`` with parameters of its own, which are trained along. ``epoch`` counts from 0, with
    the fraction of the running one, and ``epochs`` is where training ends: for whatever is annealed.
    """

    def __call__(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> Tensor: ...


def inputs_of(batch: Batch) -> list[Tensor]:
    """What the network is called with, in the order of its inputs."""
    return [x for name, x in batch.items() if name != LABELS]


def scores_of(network: nn.Module, batch: Batch) -> Tensor:
    """The first output of the network on the batch, in float32."""
    found = network(*inputs_of(batch))
    first: Tensor = found[0] if isinstance(found, tuple | list) else found
    return first.float()


class CrossEntropy:
    """Cross entropy of the scores with the labels, smoothed."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> Tensor:
        return F.cross_entropy(scores_of(network, batch), batch[LABELS], label_smoothing=self.label_smoothing)
