"""Mirror images of the calibration samples: more data, and the only ones that no factor was fitted to.

A thousand images are few for the factors of a network: on ResNet-20 the loss on the images that a plan was fitted to
tells little of the loss on others, and among plans that are close, nothing (docs/results.md). Where a classifier
takes an image and its mirror image for the same, the mirrored samples judge the plans, and the plan that is chosen is
fitted anew on both. Whether it does is asked of the original network; no label is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from codegen.space import calibration_count
from codegen.walks import outputs_under
from passes.core.cost import OpWork
from passes.core.site import Chain
from passes.onnx_stepper import Feeds, Stepper
from passes.sensitivity import divergence, is_classifier

if TYPE_CHECKING:
    import torch

APART = 0.1
"""How far outputs may move by mirroring, squared, in units of how far those of two samples are apart on average."""

ALIKE = 0.95
"""The share of samples that must keep their class."""


@dataclass(frozen=True, eq=False)
class Mirrored:
    """``feeds``: the mirrored samples; ``both``: the samples, and behind them the mirrored ones, ``count`` of each.

    ``outputs``: what the original network makes of the mirrored ones.
    """

    stepper: Stepper
    feeds: Feeds
    both: Feeds
    outputs: Mapping[str, torch.Tensor]
    count: int

    def loss(self, chains: Mapping[str, Chain]) -> float:
        """What a network with ``chains`` loses on the mirrored samples, as :func:`divergence` measures it."""
        return divergence(outputs_under(self.stepper, self.feeds, chains), self.outputs)


def mirrored(
    stepper: Stepper, feeds: Feeds, ops: Sequence[OpWork], straight: Mapping[str, torch.Tensor] | None = None
) -> Mirrored | None:
    """The mirrored samples of a network with one input, a batch of images (N, C, H, W), where mirroring means nothing.

    None for any other network, and where calibration cannot hold twice the samples. ``ops``: the network's work.
    ``straight``: its outputs on ``feeds``, where they are known.
    """
    if not isinstance(feeds, Mapping) or len(feeds) != 1:
        return None
    ((name, images),) = feeds.items()
    pixels = np.asarray(images)
    count = len(pixels) if pixels.ndim else 0
    if pixels.ndim != 4 or pixels.dtype.kind != "f" or count < 2 or calibration_count(ops, 2 * count) < 2 * count:
        return None
    turned = np.ascontiguousarray(pixels[..., ::-1])
    straight = outputs_under(stepper, feeds, {}) if straight is None else straight
    if not is_classifier(straight):
        return None
    outputs = outputs_under(stepper, {name: turned}, {})
    if not _means_nothing(straight, outputs):
        return None
    return Mirrored(stepper, {name: turned}, {name: np.concatenate([pixels, turned])}, outputs, count)


def _means_nothing(straight: Mapping[str, torch.Tensor], turned: Mapping[str, torch.Tensor]) -> bool:
    a, b = (
        next(x.double() for x in outputs.values() if x.is_floating_point() and x.ndim == 2)
        for outputs in (straight, turned)
    )
    spread = 2 * float((a - a.mean(0)).square().sum())
    moved = float((a - b).square().sum())
    alike = float((a.argmax(1) == b.argmax(1)).double().mean())
    return moved <= APART * spread and alike >= ALIKE
