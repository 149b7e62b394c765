"""Reads conv and linear nodes of a torch.fx network into sites, or refuses them with a reason.

    nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, nn.Linear       called as modules
    conv*, conv_transpose*, convolution, linear, matmul, mm,   with a stored weight: functions, methods, and the
    addmm                                                      operators of torch.export

A site is always one node between its input and its output. A weight may be stored as it is, or follow from what is
stored (``weight.t()``, a parametrization): at inference that is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from passes.core.site import Array, Geometry, Site, Stage
from passes.errors import first_line
from passes.fx_constants import constant, floats
from passes.fx_network import Network, Refusal, forms, label, tensors_of
from passes.fx_operators import FOREIGN, KIN, bound, has_hooks, torch_name
from passes.torch_apply import pads_of
from passes.training.layers import StageLayer

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTION_ARGUMENTS = (*_CONV_ARGUMENTS[:6], "transposed", "output_padding", "groups")


@dataclass(frozen=True, eq=False)
class Spot:
    """A site and what emission needs of its place: ``nodes`` go together when it is replaced.

    ``dtype``: what the weight is stored in.
    """

    site: Site
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    dtype: torch.dtype

    @property
    def target(self) -> fx.Node:
        return self.nodes[-1]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a node says of itself: ``weight`` and ``bias`` as torch stores them, with the weight's key."""

    source: Any
    weight: torch.Tensor
    key: str
    stage: Stage
    channel_axis: int


def is_kin(net: Network, node: fx.Node) -> bool:
    """True for nodes that multiply with weights, or could."""
    return torch_name(net, node) in KIN or (node.op == "call_module" and _holds_layer(net.called(node)))


def _holds_layer(module: nn.Module) -> bool:
    return isinstance(module, StageLayer | nn.modules.conv._ConvNd | nn.Linear | nn.RNNBase | nn.RNNCellBase)


def read(net: Network, node: fx.Node) -> Spot:
    """The site at ``node``. Raises Refusal with the reason where it is none."""
    name = torch_name(net, node)
    if name in FOREIGN and not (node.op == "call_module" and isinstance(net.called(node), StageLayer)):
        raise Refusal(FOREIGN[name])
    try:
        if node.op == "call_module":
            layer = _module(net, node)
        elif name in ("conv", "convtranspose", "convolution"):
            layer = _convolution(net, node, name)
        else:
            layer = _product(net, node, name)
    except (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        first = first_line(error)
        raise Refusal(f"its arguments and shapes do not fit together: {first}") from error
    return _spot(node, layer)


def _spot(node: fx.Node, layer: _Layer) -> Spot:
    source, stage = layer.source, layer.stage
    if not isinstance(source, fx.Node) or len(forms(source)) != 1 or len(forms(node)) != 1:
        raise Refusal("the shape of its input or output is unknown")
    x, y = forms(source)[0], forms(node)[0]
    n = stage.geometry.ndim
    if n and len(x.shape) != n + 2:
        raise Refusal(f"its input has {len(x.shape)} axes; a {n}-D convolution in a chain needs batch and channels")
    axis = layer.channel_axis
    spatial = stage.geometry.output_spatial(x.shape[2:]) if n else ()
    if x.shape[axis] != stage.in_channels or y.shape[axis] != stage.out_channels or (n and y.shape[2:] != spatial):
        raise Refusal(f"its weight and arguments do not give {y.shape} for {x.shape}")
    if not all(x.shape):
        raise Refusal("its input is empty")
    if len({x.dtype, y.dtype, layer.weight.dtype}) != 1:
        raise Refusal(f"its input is of type {x.dtype}, its weight of {layer.weight.dtype}".replace("torch.", ""))
    transposed = stage.geometry.transposed
    op = ("ConvTranspose" if transposed else "Conv") if n else ("Gemm" if len(x.shape) == 2 else "MatMul")
    (name,), (reads,) = tensors_of(node), tensors_of(source)
    site = Site(label(node), op, stage, reads, name, x.shape, y.shape, axis, False, layer.key)
    return Spot(site, (node,), source, layer.weight.dtype)


def _module(net: Network, node: fx.Node) -> _Layer:
    """A call of a layer's module. What torch itself does not bring was traced through, and comes as functions."""
    module = net.called(node)
    kind = type(module)
    if kind not in (*_CONVS, *_TRANSPOSED, nn.Linear, StageLayer):
        raise Refusal(f"a {kind.__name__} does more than its weight says, or other than a plain layer")
    if has_hooks(module):
        raise Refusal("its module has forward hooks, which may change what it computes: remove them before tracing")
    if len(node.args) + len(node.kwargs) != 1:
        raise Refusal("it is called with an output size")
    source = next(iter((*node.args, *node.kwargs.values())))
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
    key = net.key_of(weight, f"{node.target}.weight")
    if isinstance(module, StageLayer):
        stage = Stage(floats(module.weight), _bias(bias), module.geometry)
        return _Layer(source, weight, key, stage, module.channel_axis)
    if isinstance(module, nn.Linear):
        return _Layer(source, weight, key, Stage(floats(weight), _bias(bias)), -1)
    assert isinstance(module, nn.modules.conv._ConvNd)
    if module.padding_mode != "zeros":
        raise Refusal(f"it pads by '{module.padding_mode}'; only zeros can be padded in a chain")
    n = len(module.kernel_size)
    geometry = _geometry(
        tuple(weight.shape[2:]),
        (module.stride, module.padding, module.dilation),
        module.groups,
        module.output_padding if kind in _TRANSPOSED else None,
    )
    assert geometry.ndim == n
    return _Layer(source, weight, key, _conv_stage(weight, _bias(bias), geometry), 1)


def _convolution(net: Network, node: fx.Node, name: str) -> _Layer:
    names = {"conv": _CONV_ARGUMENTS, "convtranspose": _TRANSPOSED_ARGUMENTS, "convolution": _CONVOLUTION_ARGUMENTS}
    given = bound(node, names[name])
    weight, key = constant(net, given["weight"])
    bias = None if given.get("bias") is None else constant(net, given["bias"], "bias")[0]
    transposed = name == "convtranspose" or bool(given.get("transposed", False))
    n = weight.ndim - 2
    numbers = [given.get(argument, default) for argument, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    outer = given.get("output_padding", 0) if transposed else None
    if any(isinstance(part, fx.Node) for value in (*numbers, outer, given.get("groups")) for part in _parts(value)):
        raise Refusal("its strides, padding, dilation or groups are computed")
    kernel = tuple(weight.shape[2:])
    if n < 1:
        raise Refusal(f"its weight has {weight.ndim} dimensions")
    geometry = _geometry(kernel, (numbers[0], numbers[1], numbers[2]), int(given.get("groups", 1)), outer)
    return _Layer(given["input"], weight, key, _conv_stage(weight, _bias(bias), geometry), 1)


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _geometry(kernel: tuple[int, ...], walk: tuple[Any, Any, Any], groups: int, output_padding: Any) -> Geometry:
    """``walk``: stride, padding, dilation; padding may be "same" or "valid". ``output_padding`` None for what is not
    transposed."""
    n = len(kernel)
    stride, padding, dilation = walk

    def each(value: Any) -> tuple[int, ...]:
        numbers = tuple(int(v) for v in _parts(value))
        return numbers * n if len(numbers) == 1 else numbers

    dilations = each(dilation)
    pads = pads_of(padding if isinstance(padding, str) else each(padding), kernel, dilations)
    transposed = output_padding is not None
    outer = each(output_padding) if transposed else ()
    return Geometry(kernel, each(stride), dilations, pads, groups, transposed, outer)


def _conv_stage(weight: torch.Tensor, bias: Array | None, geometry: Geometry) -> Stage:
    value = floats(weight)
    if geometry.transposed:  # (I, O/groups, *kernel), the input's channels first
        inputs, outputs = value.shape[:2]
        grouped = value.reshape(geometry.groups, inputs // geometry.groups, outputs, *geometry.kernel)
        value = grouped.swapaxes(1, 2).reshape(geometry.groups * outputs, -1, *geometry.kernel)
    return Stage(value, None if bias is None else bias.astype(value.dtype), geometry)


def _bias(bias: torch.Tensor | None) -> Array | None:
    return None if bias is None else floats(bias, "bias")


def _product(net: Network, node: fx.Node, name: str) -> _Layer:
    if name == "linear":
        given = bound(node, ("input", "weight", "bias"))
        weight, key = constant(net, given["weight"])
        bias = None if given.get("bias") is None else constant(net, given["bias"], "bias")[0]
        if weight.ndim != 2:
            raise Refusal(f"its weight has {weight.ndim} dimensions")
        return _Layer(given["input"], weight, key, Stage(floats(weight), _bias(bias)), -1)
    if name == "addmm":
        return _addmm(net, node)
    given = bound(node, ("input", "other"))
    first, second = given.get("input"), given.get("other", given.get("mat2"))
    stored = [isinstance(operand, fx.Node) and net.is_stored(operand) for operand in (first, second)]
    if all(stored):
        raise Refusal("both operands are constant")
    if not any(stored):
        raise Refusal("both operands are computed")
    left = stored[0]
    weight, key = constant(net, first if left else second)
    value, source = floats(weight), second if left else first
    rank = len(forms(source)[0].shape) if isinstance(source, fx.Node) and forms(source) else 0
    if value.ndim < 2:
        raise Refusal("its constant is a vector")
    if prod(value.shape[:-2]) != 1 or value.ndim > max(rank, 2):
        raise Refusal(f"its constant of shape {value.shape} is a batch of matrices")
    value = value.reshape(value.shape[-2:])
    # A vector on the right is a row on the left of the transposed matrix.
    axis = -2 if left and rank > 1 else -1
    return _Layer(source, weight, key, Stage(value if left else value.T, None), axis)


def _addmm(net: Network, node: fx.Node) -> _Layer:
    """beta * bias + alpha * (x @ W)."""
    given = bound(node, ("input", "mat1", "mat2"))
    weight, key = constant(net, given["mat2"])
    shift, _ = constant(net, given["input"], "bias")
    alpha, beta = given.get("alpha", 1), given.get("beta", 1)
    value, out = floats(weight).T, weight.shape[-1]
    if (shift.ndim > 1 and prod(shift.shape[:-1]) != 1) or shift.numel() not in (1, out):
        raise Refusal(f"its bias of shape {tuple(shift.shape)} is not one number per output channel")
    bias = floats(shift.reshape(-1).expand(out).contiguous(), "bias")
    if alpha != 1:
        value = (value * alpha).astype(value.dtype)
    return _Layer(given["mat1"], weight, key, Stage(value, (bias * beta).astype(value.dtype)), -1)
