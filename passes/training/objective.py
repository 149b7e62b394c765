"""What a step of training minimises."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from passes.errors import InputError
from passes.training.augment import Batch
from passes.training.data import LABELS

Tensor = torch.Tensor


class Objective(Protocol):
    """A loss of a network on a batch: the mean over its samples, plus what depends on the weights alone.

    It may be a ``torch.nn.Module`` with parameters of its own, which are trained along. ``epoch`` counts from 0, with
    the fraction of the running one, and ``epochs`` is where training ends: for whatever is annealed. Random draws come
    from torch's default generators, which are set before each step.

    It may have a method ``describe() -> dict[str, Any]``: what it was made with, as JSON values. A checkpoint of a run
    with another description is refused.
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
    """Cross entropy of the scores with the labels, smoothed. InputError for a class that there is no score for."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> Tensor:
        scores, labels = scores_of(network, batch), batch[LABELS]
        try:
            return F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        except IndexError as error:  # on a GPU the kernel's own assertion ends the process
            raise InputError(f"a label is {int(labels.max())}, the network scores {scores.shape[1]} classes") from error

    def describe(self) -> dict[str, Any]:
        return {"label_smoothing": self.label_smoothing}
