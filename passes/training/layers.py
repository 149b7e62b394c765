"""Stages and chains as trainable modules, in the compiler's own convention of weights and geometry."""

from __future__ import annotations

import torch
from torch import nn

from passes.core.site import Array, Chain, Geometry, Stage
from passes.torch_apply import convolve, pads_of

Tensor = torch.Tensor


class StageLayer(nn.Module):
    """A :class:`Stage` whose weight (O, I/groups, *kernel) and bias (O,) are trained.

    ``channel_axis``: where inputs and outputs keep their channels; 1 for convolutions, -1 or -2 for linear layers.
    """

    def __init__(self, stage: Stage, channel_axis: int = 1) -> None:
        super().__init__()
        self.geometry: Geometry = stage.geometry
        self.channel_axis = channel_axis if stage.geometry.ndim == 0 else 1
        self.weight = nn.Parameter(torch.tensor(stage.weight, dtype=torch.float32))
        self.bias = None if stage.bias is None else nn.Parameter(torch.tensor(stage.bias, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.geometry, self.channel_axis, x, self.weight, self.bias)

    def stage(self) -> Stage:
        """The layer as it is now, as float32 arrays of its own."""
        bias = None if self.bias is None else _array(self.bias)
        return Stage(_array(self.weight), bias, self.geometry)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.geometry}"


class ChainLayer(nn.Sequential):
    """A :class:`Chain` whose stages are trained; what stands in the place of a site."""

    def __init__(self, chain: Chain, channel_axis: int = 1) -> None:
        super().__init__(*(StageLayer(stage, channel_axis) for stage in chain.stages))
        self.format, self.rank = chain.format, chain.rank

    def chain(self) -> Chain:
        """The chain as it is now."""
        return Chain(tuple(layer.stage() for layer in self.stages()), self.format, self.rank)

    def stages(self) -> list[StageLayer]:
        return [layer for layer in self if isinstance(layer, StageLayer)]


def apply(g: Geometry, channel_axis: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`convolve` for a linear layer on inputs of any number of axes, channels on ``channel_axis``."""
    if g.ndim:
        return convolve(g, x, weight, bias)
    last = x.movedim(channel_axis, -1)
    y = convolve(g, last.reshape(-1, last.shape[-1]), weight, bias)
    return y.reshape(*last.shape[:-1], y.shape[-1]).movedim(-1, channel_axis)


def stage_of(layer: nn.Module) -> Stage | str:
    """A torch convolution or linear layer as a stage; a sentence where it is none or cannot be one."""
    if isinstance(layer, StageLayer):
        return layer.stage()
    if isinstance(layer, nn.Linear):
        return Stage(_array(layer.weight), None if layer.bias is None else _array(layer.bias))
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"{type(layer).__name__} is no convolution and no linear layer"
    if layer.padding_mode != "zeros":
        return f"it pads by {layer.padding_mode!r}; only zeros can be padded in a chain"
    pads = pads_of(layer.padding, layer.kernel_size, layer.dilation)
    geometry = Geometry(tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation), pads, layer.groups)
    return Stage(_array(layer.weight), None if layer.bias is None else _array(layer.bias), geometry)


def fold(stage: Stage, norm: nn.Module) -> Stage:
    """The stage followed by a BatchNorm in inference mode, as one stage. TypeError for another module."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"{type(norm).__name__} is no BatchNorm")
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return stage.affine(scale.cpu().numpy(), shift.cpu().numpy())


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().float().cpu().contiguous().numpy().copy()
    return found
