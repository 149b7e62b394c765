"""Convolutions of small maps on processors: all samples of a batch side by side, as one wide map.

oneDNN multiplies in bfloat16 by rows of a map. Rows of two or four positions leave most of a tile empty, and the deep
layers of a network for small images consist of nothing else: 512 channels on 4x4 and 2x2 positions were a third of
VGG-16's work and two thirds of its time (docs/training.md). Zeros that keep the samples apart are the padding that the
convolution wants anyway, so nothing changes but the order of additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor

POSITIONS = 16
"""Maps of more positions are as fast by themselves."""

WEIGHTS = 100_000
"""With fewer weights the copies cost more than they save."""


class SideBySide(TorchFunctionMode):
    """Within it, a convolution in two dimensions that :func:`pays` for is computed by :func:`side_by_side`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and not kwargs and pays(*args):
            return side_by_side(args[0], args[1], args[2], args[4])
        return func(*args, **(kwargs or {}))


def pays(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> bool:
    """True for products of bfloat16 on a processor, of many weights with small maps, that keep the maps' size.

    The arguments are those of ``torch.nn.functional.conv2d``.
    """
    if x.ndim != 4 or not 0 < x.shape[2] * x.shape[3] <= POSITIONS or not len(x) or x.device.type != "cpu":
        return False
    if weight.numel() < WEIGHTS or torch.float64 in (x.dtype, weight.dtype):  # doubles stay doubles in autocast
        return False
    number = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    same = isinstance(padding, tuple | list) and [2 * p + 1 for p in padding] == list(weight.shape[2:])
    ones = all(n in (1, (1, 1), [1, 1]) for n in (stride, dilation, groups))
    return number == torch.bfloat16 and same and ones


def side_by_side(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=padding)`` as one map, for a kernel of 2 * ``padding`` + 1."""
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    count, channels, height, width = x.shape
    apart = padding[1]
    row = F.pad(x, (0, apart)).permute(2, 0, 3, 1).reshape(1, height, count * (width + apart), channels)
    y = F.conv2d(row.permute(0, 3, 1, 2), weight, bias, padding=tuple(padding))
    y = y.view(-1, height, count, width + apart)[..., :width].permute(2, 0, 1, 3)
    return y.contiguous(memory_format=torch.channels_last)
