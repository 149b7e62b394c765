"""Augmentations of image batches, drawn from a generator of their own: the same step always sees the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Batch = dict[str, Tensor]
Augmentation = Callable[[Batch, torch.Generator], Batch]
"""Inputs by name (and "labels") to the same, of the same shapes. Draws from the generator alone."""


def flip(batch: Batch, generator: torch.Generator) -> Batch:
    """Every image of the batch mirrored left to right, or not, by a coin each."""
    return {name: _flipped(x, generator) if _is_image(name, x) else x for name, x in batch.items()}


def crop_flip(batch: Batch, generator: torch.Generator) -> Batch:
    """Images shifted by up to an eighth of their size in both directions, zeros moving in; then :func:`flip`."""
    return flip({n: _shifted(x, generator) if _is_image(n, x) else x for n, x in batch.items()}, generator)


def _is_image(name: str, x: Tensor) -> bool:
    return name != "labels" and x.ndim == 4


def _flipped(x: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(chosen.to(x.device)[:, None, None, None], x.flip(3), x)


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = x.shape
    down, right = height // 8, width // 8
    padded = F.pad(x, (right, right, down, down))
    tops = torch.randint(0, 2 * down + 1, (count,), generator=generator).to(x.device)
    lefts = torch.randint(0, 2 * right + 1, (count,), generator=generator).to(x.device)
    rows = tops[:, None] + torch.arange(height, device=x.device)
    columns = lefts[:, None] + torch.arange(width, device=x.device)
    image = torch.arange(count, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def none(batch: Batch, generator: torch.Generator) -> Batch:
    """The batch as it is."""
    return batch


AUGMENTATIONS: Mapping[str, Augmentation] = {"none": none, "flip": flip, "crop_flip": crop_flip}
