"""Judging a network on samples, and the memory order that its convolutions run fastest in."""

from __future__ import annotations

import torch
from torch import nn

from passes.training.augment import Batch
from passes.training.data import LABELS, TrainingSet
from passes.training.objective import scores_of

Tensor = torch.Tensor


def lay_out(network: nn.Module) -> None:
    """Puts every image-like weight into channels-last order, in which convolutions run faster."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def laid_out(batch: Batch, device: torch.device | None = None) -> Batch:
    """The batch on ``device`` with its images in channels-last order."""
    moved = batch if device is None else {name: x.to(device) for name, x in batch.items()}
    return {n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in moved.items()}


def device_of(network: nn.Module) -> torch.device:
    """Where the network's parameters are; the processor for one without any."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


@torch.no_grad()
def accuracy(network: nn.Module, data: TrainingSet, batch: int = 250) -> float:
    """Top-1 of the network's first output on labelled samples, in inference mode. ValueError without labels."""
    if data.labels is None:
        raise ValueError("accuracy needs labels")
    network.eval()
    device = device_of(network)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for part in data.batches(batch):
        there = laid_out(part, device)
        right += (scores_of(network, there).argmax(1) == there[LABELS]).sum()
    return int(right) / len(data)


@torch.no_grad()
def reestimate_batchnorm(network: nn.Module, data: TrainingSet, samples: int, batch: int = 250) -> None:
    """Running means and variances of every BatchNorm, anew from the first ``samples`` samples; the weights stay.

    The mean over batches of equal size; a smaller rest at the end counts only where it is all there is. Everything
    but the BatchNorms (dropout) is in inference mode meanwhile, and all of it afterwards.
    """
    network.eval()
    norms = [
        m
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        count, device = min(samples, len(data)), device_of(network)
        for start in range(0, max(count - batch, 0) + 1, batch):
            index = torch.arange(start, min(start + batch, count))
            scores_of(network, laid_out(data.take(index), device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.eval()
