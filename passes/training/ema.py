"""A running mean of a network's weights: what training with noise in every step is judged and kept by."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

Tensor = torch.Tensor


class AveragedWeights:
    """The exponential mean of every float of ``network.state_dict()``; whole numbers are the newest.

    After n steps it forgets by min(``decay``, (1 + n) / (10 + n)), so that the random start is soon out of it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.mean: dict[str, Tensor] = copy.deepcopy(network.state_dict())

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Takes in the weights after step number ``steps``, counted from 1."""
        keep = min(self.decay, (1 + steps) / (10 + steps))
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.mean[name].lerp_(value, 1 - keep)
            else:
                self.mean[name].copy_(value)

    def load(self, mean: dict[str, Tensor]) -> None:
        """Goes on from a saved mean, whatever device it was saved on."""
        for name, value in self.mean.items():
            value.copy_(mean[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network holds the mean meanwhile."""
        trained = copy.deepcopy(self.network.state_dict())
        self.network.load_state_dict(self.mean)
        try:
            yield
        finally:
            self.network.load_state_dict(trained)
