"""Nodes behind a site that scale and shift its channels: what fold_batchnorm folds.

BatchNorm in inference mode (module, function, torch.export's operators), and +, -, *, / with one constant per channel
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from passes.core.site import Array
from passes.fx_constants import constant, vector
from passes.fx_network import Network, Refusal, forms, is_item, label
from passes.fx_operators import bound, has_hooks, onnx_name, torch_name
from passes.fx_sites import Spot
from passes.graph import Affine

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]

_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FUNCTION = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_ATEN_INFERENCE = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")


@dataclass(frozen=True, eq=False)
class Following:
    """An affine and the nodes that make it up: one, or an operator with several results and the item taken."""

    affine: Affine
    nodes: tuple[fx.Node, ...]


def affine_after(net: Network, spot: Spot) -> Following | None:
    """The affine node that is the only reader of the site's output, or None."""
    node = net.only_reader(spot.target)
    if node is None:
        return None
    name = torch_name(net, node)
    nodes: tuple[fx.Node, ...] = (node,)
    try:
        if name in ("nativebatchnorm", "nativebatchnormlegitnotraining"):
            item = net.only_reader(node)
            if item is None or not is_item(item) or item.args[1] != 0:
                return None
            nodes = (node, item)
        if "batchnorm" in name:
            scale, shift = _batchnorm(net, spot, node, name)
        elif name in _ARITHMETIC and not _has_more_arguments(node):
            scale, shift = _elementwise(net, spot, node, _ARITHMETIC[name])
        else:
            return None
    except Refusal:
        return None  # not affine per channel: it is left where it stands
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return None
    if forms(nodes[-1]) != forms(spot.target):
        return None  # it broadcasts or converts as well
    return Following(Affine(label(node), onnx_name(net, node), spot.site, scale, shift), nodes)


def _batchnorm(net: Network, spot: Spot, node: fx.Node, name: str) -> Pair:
    """gamma * (x - mean) / sqrt(var + eps) + beta. In training mode the statistics are those of the batch."""
    if spot.site.channel_axis % len(spot.site.output_shape) != 1:
        raise Refusal("it works on another axis")
    channels = spot.site.stage.out_channels
    if node.op == "call_module":
        module = net.called(node)
        if type(module) not in _MODULES or has_hooks(module) or len(node.args) + len(node.kwargs) != 1:
            raise Refusal("no plain BatchNorm")
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training or module.running_mean is None or module.running_var is None:
            raise Refusal("it takes the statistics of the batch")
        return _pair(channels, module.running_mean, module.running_var, module.weight, module.bias, module.eps)
    function = not isinstance(node.target, torch._ops.OpOverload) and getattr(node.target, "__module__", "") != "torch"
    names = _FUNCTION if function else _ATEN_INFERENCE if name == "nativebatchnormlegitnotraining" else _ATEN
    given = bound(node, names)
    if given["input"] is not spot.target or given.get("training", False) is not False:
        raise Refusal("it takes the statistics of the batch")
    stored = [
        None if given.get(part) is None else constant(net, given[part], part)[0]
        for part in ("running_mean", "running_var", "weight", "bias")
    ]
    if stored[0] is None or stored[1] is None:
        raise Refusal("it takes the statistics of the batch")
    return _pair(channels, stored[0], stored[1], stored[2], stored[3], float(given.get("eps", 1e-5)))


def _pair(
    channels: int,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Pair:
    gamma = np.ones(channels) if weight is None else vector(weight)
    beta = np.zeros(channels) if bias is None else vector(bias)
    scale = gamma / np.sqrt(vector(var) + eps)
    return scale, beta - vector(mean) * scale


_ARITHMETIC = {
    **{"add": "+", "iadd": "+", "sub": "-", "isub": "-", "mul": "*", "imul": "*"},
    **{"div": "/", "truediv": "/", "itruediv": "/"},
}


def _has_more_arguments(node: fx.Node) -> bool:
    """True where an ``alpha`` or a rounding mode changes the meaning."""
    return len(node.args) + len(node.kwargs) != 2


def _elementwise(net: Network, spot: Spot, node: fx.Node, sign: str) -> Pair:
    given = bound(node, ("input", "other"))
    if set(given) != {"input", "other"}:
        raise Refusal("its operands are not called input and other")
    first, second = given["input"], given["other"]
    leads = first is spot.target
    operand = second if leads else first
    c = _along(net, spot, operand)
    one, zero = np.ones_like(c), np.zeros_like(c)
    if sign == "*":
        return c, zero
    if sign == "+":
        return one, c
    if sign == "-":
        return (one, -c) if leads else (-one, c)
    if not leads or not c.all():
        raise Refusal("a division by the output, or by zero")
    return 1.0 / c, zero


def _along(net: Network, spot: Spot, operand: Any) -> Array:
    """``operand``, which is broadcast against the site's output, as one number per channel. Raises Refusal."""
    channels, shape = spot.site.stage.out_channels, spot.site.output_shape
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return np.full(channels, float(operand))
    value = vector(constant(net, operand, "operand")[0])
    axis = spot.site.channel_axis % len(shape)
    if value.ndim > len(shape):
        raise Refusal("it has more axes than the output")
    padded = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    if any(n != 1 for i, n in enumerate(padded.shape) if i != axis) or padded.shape[axis] not in (1, channels):
        raise Refusal("it is not one number per channel")
    return np.broadcast_to(padded.reshape(-1), (channels,)).copy()
