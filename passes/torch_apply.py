"""Stages and chains on torch tensors, along whatever axis a site keeps its channels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from passes.core.mapped import is_mapped, release
from passes.core.site import Array, Chain, Geometry, Site, Stage

Tensor = torch.Tensor


def apply_stage(stage: Stage, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The stage on ``x``: (N, C, *spatial), or (N, C) when linear. ``weight``/``bias`` stand in for the stage's own."""
    weight = _constant(stage.weight, x) if weight is None else weight
    if bias is None and stage.bias is not None:
        bias = _constant(stage.bias, x)
    return convolve(stage.geometry, x, weight, bias)


def pads_of(padding: str | Sequence[int], kernel: Sequence[int], dilations: Sequence[int]) -> tuple[int, ...]:
    """Pads as a geometry has them, all begins and then all ends, of a torch convolution's padding.

    Where "same" needs an odd sum, torch puts the larger half at the end.
    """
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        return (*(r // 2 for r in reach), *(r - r // 2 for r in reach))
    numbers = (0,) * len(kernel) if padding == "valid" else tuple(int(p) for p in padding)
    return numbers + numbers


def convolve(g: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer of geometry ``g`` on ``x``, (N, C, *spatial) or (N, C) when linear; ``weight`` (O, I/groups, *kernel)."""
    n = g.ndim
    if n == 0:
        if g.groups == 1:
            return F.linear(x, weight, bias)
        grouped = weight.reshape(g.groups, -1, weight.shape[1])
        y = torch.einsum("ngi,goi->ngo", x.reshape(x.shape[0], g.groups, -1), grouped).reshape(x.shape[0], -1)
        return y if bias is None else y + bias
    begin, end = g.pads[:n], g.pads[n:]
    if g.transposed:
        return _transposed(g, x, weight, bias)
    if begin != end:
        x = F.pad(x, [p for axis in reversed(range(n)) for p in (begin[axis], end[axis])])
        begin = (0,) * n
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    y_: Tensor = run(x, weight, bias, g.strides, begin, g.dilations, g.groups)
    return y_


def _constant(array: Array, like: Tensor) -> Tensor:
    """A tensor of the array's values; copied where torch could not share them without risk to their owner.

    What lies in a file is shared whatever the risk: a copy might not fit into memory.
    """
    if is_mapped(array):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody must write to it
            return torch.from_numpy(array).to(like.dtype)
    usable = array.flags.writeable and array.flags.c_contiguous
    return torch.from_numpy(array if usable else array.copy(order="C")).to(like.dtype)


def _transposed(g: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n = g.ndim
    out, inner, *kernel = weight.shape
    weight = weight.reshape(g.groups, out // g.groups, inner, *kernel).swapaxes(1, 2)
    weight = weight.reshape(g.groups * inner, out // g.groups, *kernel)
    run: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    y = run(x, weight, bias, g.strides, 0, 0, g.groups, g.dilations)
    full = g.output_spatial(tuple(x.shape[2:]))
    grow = [max(0, g.pads[a] + full[a] - y.shape[2 + a]) for a in range(n)]
    if any(grow):  # output padding past the last tap holds the bias alone
        y = F.pad(y - _wide(bias, n), [p for axis in reversed(range(n)) for p in (0, grow[axis])]) + _wide(bias, n)
    crop = tuple(slice(g.pads[a], g.pads[a] + full[a]) for a in range(n))
    cropped: Tensor = y[(slice(None), slice(None), *crop)]
    return cropped


def _wide(bias: Tensor | None, n: int) -> Tensor | float:
    return 0.0 if bias is None else bias.reshape(1, -1, *(1,) * n)


def channels_second(site: Site, x: Tensor) -> Tensor:
    """A site's input or output as (N, C, *spatial) or, when linear, as (rows, C)."""
    if site.stage.geometry.ndim:
        return x
    return x.movedim(site.channel_axis, -1).reshape(-1, x.shape[site.channel_axis])


def restore(site: Site, y: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`channels_second` for an output; ``like`` is the site's input."""
    if site.stage.geometry.ndim:
        return y
    lead = like.movedim(site.channel_axis, -1).shape[:-1]
    return y.reshape(*lead, y.shape[-1]).movedim(-1, site.channel_axis)


def run_chain(site: Site, chain: Chain, x: Tensor) -> Tensor:
    """The chain in the place of the site, on the site's own input layout."""
    y = channels_second(site, x)
    for stage in chain.stages:
        y = apply_stage(stage, y)
        release(stage.weight)
    return restore(site, y, x)


def as_array(site: Site, x: Tensor) -> Array:
    """A site's tensor as a NumPy array with channels second."""
    return channels_second(site, x).detach().numpy()
