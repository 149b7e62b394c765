"""ONNX operators for networks under training: those of the walk, and more of them.

Same form as :data:`passes.onnx_torch_ops.OPS`. Nothing is computed in place, since what follows a layer must not
change what was kept of it. Where reduced precision would hurt, operators step out of autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from passes.onnx_attributes import Attributes
from passes.onnx_module_values import Values
from passes.onnx_torch_ops import OPS, Inputs, Op

Tensor = torch.Tensor

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _same_pads(attributes: Attributes, spatial: Sequence[int], kernel: Sequence[int]) -> Attributes:
    """Explicit pads for the size that this call has, where the node asks for SAME ones."""
    mode = attributes.get("auto_pad", "NOTSET")
    if not mode.startswith("SAME"):
        return attributes
    n = len(kernel)
    strides, dilations = attributes.get("strides", [1] * n), attributes.get("dilations", [1] * n)
    totals = [
        max((ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0)
        for size, k, s, d in zip(spatial, kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return attributes.changed(auto_pad="NOTSET", pads=[*small, *large] if mode == "SAME_UPPER" else [*large, *small])


def conv(attributes: Attributes, inputs: Inputs, opset: int) -> Sequence[Tensor] | None:
    x, weight = inputs[:2]
    assert x is not None and weight is not None
    return OPS["Conv"](_same_pads(attributes, x.shape[2:], weight.shape[2:]), inputs, opset)


def _spread(pads: Sequence[int]) -> list[int]:
    n = len(pads) // 2
    return [p for axis in reversed(range(n)) for p in (pads[axis], pads[axis + n])]


def max_pool(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    kernel = attributes.get("kernel_shape", [])
    n = len(kernel)
    attributes = _same_pads(attributes, x.shape[2:], kernel)
    pads = attributes.pads(n)
    if pads is None or n > 3 or attributes.outputs > 1:
        return None
    if any(pads):
        x = F.pad(x, _spread(pads), value=float("-inf"))
    run: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
    strides, dilations = attributes.get("strides", [1] * n), attributes.get("dilations", [1] * n)
    return [run(x, kernel, strides, 0, dilations, bool(attributes.get("ceil_mode", 0)))]


def average_pool(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    """Where padding counts nothing, the mean over all is divided by the share of what counts."""
    x = inputs[0]
    assert x is not None
    kernel = attributes.get("kernel_shape", [])
    n = len(kernel)
    attributes = _same_pads(attributes, x.shape[2:], kernel)
    pads = attributes.pads(n)
    if pads is None or n > 3 or any(d != 1 for d in attributes.get("dilations", [1] * n)):
        return None
    run: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    up, strides = bool(attributes.get("ceil_mode", 0)), attributes.get("strides", [1] * n)
    y = run(F.pad(x, _spread(pads)) if any(pads) else x, kernel, strides, 0, up)
    if any(pads) and not attributes.get("count_include_pad", 0):
        ones = F.pad(torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device), _spread(pads))
        y = y / run(ones, kernel, strides, 0, up)
    return [y]


def global_max_pool(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    return [x.amax(dim=tuple(range(2, x.ndim)), keepdim=True)]


def resize(attributes: Attributes, inputs: Inputs, opset: int) -> Sequence[Tensor] | None:
    """A batch is never resized, whatever size of it a file has among the sizes."""
    x, *rest = inputs
    assert x is not None
    if len(rest) > 2 and isinstance(rest[2], Values) and "axes" not in attributes:
        rest[2] = Values([x.shape[0], *rest[2].tolist()[1:]])
    return OPS["Resize"](attributes, [x, *rest], opset)


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Op:
    def reduce(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
        x, axes = [*inputs, None][:2]
        assert x is not None
        listed = attributes.get("axes", None) if axes is None else [int(a) for a in axes]
        if not listed and attributes.get("noop_with_empty_axes", 0):
            return [x]
        return [function(x, tuple(listed or range(x.ndim)), bool(attributes.get("keepdims", 1)))]

    return reduce


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


def instance_norm(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, scale, shift = inputs
    assert x is not None
    return [F.instance_norm(x, None, None, scale, shift, True, 0.0, attributes.get("epsilon", 1e-5))]


def group_norm(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, scale, shift = inputs
    assert x is not None
    if opset < 21:  # one number per group, not per channel
        return None
    return [F.group_norm(x, attributes.get("num_groups", 1), scale, shift, attributes.get("epsilon", 1e-5))]


def depth_to_space(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    b, (n, c, h, w) = attributes.get("blocksize", 1), x.shape
    if attributes.get("mode", "DCR") == "CRD":
        y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return [y.reshape(n, c // (b * b), h * b, w * b)]


def space_to_depth(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    b, (n, c, h, w) = attributes.get("blocksize", 1), x.shape
    return [x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)]


def cast(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    """A float stays the float that the network computes in here."""
    x, to = inputs[0], attributes.get("to", 0)
    assert x is not None
    if to in _FLOATS:
        return [x if x.is_floating_point() else x.float()]
    return [x.to(torch.from_numpy(helper.tensor_dtype_to_np_dtype(to).type(0).reshape(1)).dtype)]


def constant_of_shape(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    value = attributes.get("value", None)
    filled = torch.zeros(1) if value is None else torch.from_numpy(numpy_helper.to_array(value).copy())
    assert inputs[0] is not None
    return [filled.reshape(()).expand(inputs[0].tolist())]


def expand(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, shape = inputs
    assert x is not None and shape is not None
    wanted = list(shape.tolist())
    n = max(x.ndim, len(wanted))
    have = [1] * (n - x.ndim) + list(x.shape)
    wanted = [1] * (n - len(wanted)) + wanted
    return [x.expand([h if w == 1 else w for h, w in zip(have, wanted, strict=True)])]


def tile(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, repeats = inputs
    assert x is not None and repeats is not None
    return [x.repeat(repeats.tolist())]


def pad(attributes: Attributes, inputs: Inputs, opset: int) -> Sequence[Tensor] | None:
    mode = attributes.get("mode", "constant")
    x = inputs[0]
    assert x is not None
    if opset < 11:
        pads, value = attributes.get("pads", []), attributes.get("value", 0.0)
    else:
        given = inputs[1]
        assert given is not None
        pads, value = given.tolist(), 0.0 if len(inputs) < 3 or inputs[2] is None else float(inputs[2])
        if len(inputs) > 3 and inputs[3] is not None:
            axes, each = [a % x.ndim for a in inputs[3].tolist()], pads
            pads = [0] * (2 * x.ndim)
            for i, axis in enumerate(axes):
                pads[axis], pads[axis + x.ndim] = each[i], each[i + len(axes)]
    flat = _spread(pads)
    if mode == "constant":
        return [F.pad(x, flat, value=value)]
    while len(flat) > 2 and flat[-1] == flat[-2] == 0:
        flat = flat[:-2]
    if mode not in ("reflect", "edge") or len(flat) // 2 > x.ndim - 1:
        return None
    return [F.pad(x, flat, mode="reflect" if mode == "reflect" else "replicate")]


def lrn(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, size = inputs[0], attributes.get("size", 1)
    assert x is not None
    alpha, beta, bias = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75), attributes.get("bias", 1.0)
    square = F.pad(x.square().movedim(1, -1), ((size - 1) // 2, size // 2))
    mean = square.unfold(-1, size, 1).mean(-1).movedim(-1, 1)
    return [x / (bias + alpha * mean) ** beta]


def lp_norm(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    return [x / torch.linalg.vector_norm(x, attributes.get("p", 2), attributes.get("axis", -1), keepdim=True)]


def einsum(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    return [torch.einsum(attributes.get("equation", ""), *inputs)]


def log_softmax(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    if opset < 13:
        axis = attributes.get("axis", 1) % x.ndim
        return [torch.log_softmax(x.reshape(prod(x.shape[:axis]), -1), 1).reshape(x.shape)]
    return [torch.log_softmax(x, attributes.get("axis", -1))]


def arg_max(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    if attributes.get("select_last_index", 0):
        return None
    return [x.argmax(attributes.get("axis", 0), bool(attributes.get("keepdims", 1)))]


def mean(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    given = [v for v in inputs if v is not None]
    return [reduce(torch.add, given) / len(given)]


def clip(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, *bounds = [*inputs, None, None][:3]
    assert x is not None
    if len(inputs) == 1:
        bounds = [attributes.get("min", None), attributes.get("max", None)]
    low, high = (b if b is None or isinstance(b, Tensor) else float(b) for b in bounds)
    return [x if low is None and high is None else torch.clamp(x, low, high)]


def power(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, exponent = inputs
    assert x is not None and exponent is not None
    return [torch.pow(x, exponent if isinstance(exponent, Tensor) else float(exponent))]


def _out_of_autocast(op: Op) -> Op:
    """In single precision whatever autocast says, because the operator asks for it or needs it."""

    def run(attributes: Attributes, inputs: Inputs, opset: int) -> Sequence[Tensor] | None:
        wide = [
            v.float() if isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16) else v for v in inputs
        ]
        first = next(v for v in wide if isinstance(v, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return op(attributes, wide, opset)

    return run


def _unary(function: Callable[..., Tensor], **defaults: Any) -> Op:
    """``defaults``: the node's attributes, which go to the function in this order."""

    def run(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor]:
        return [function(inputs[0], *(attributes.get(name, value) for name, value in defaults.items()))]

    return run


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    def run(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor]:
        first, *rest = [v for v in inputs if v is not None]
        for other in rest:
            first = function(first, other)
        return [first]

    return run


MODULE_OPS: dict[str, Op] = {
    **OPS,
    "Conv": conv,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalMaxPool": global_max_pool,
    "LayerNormalization": _out_of_autocast(OPS["LayerNormalization"]),
    "InstanceNormalization": _out_of_autocast(instance_norm),
    "GroupNormalization": _out_of_autocast(group_norm),
    "Resize": _out_of_autocast(resize),
    "Upsample": _out_of_autocast(OPS["Upsample"]),
    "Softmax": _out_of_autocast(OPS["Softmax"]),
    "LogSoftmax": _out_of_autocast(log_softmax),
    "LRN": _out_of_autocast(lrn),
    "LpNormalization": _out_of_autocast(lp_norm),
    "Pow": _out_of_autocast(power),
    "Pad": pad,
    "Cast": cast,
    "Clip": clip,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Expand": expand,
    "Tile": tile,
    "Einsum": einsum,
    "ArgMax": arg_max,
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduction(_prod),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _out_of_autocast(_reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep))),
    "ReduceSumSquare": _out_of_autocast(_reduction(lambda x, axes, keep: x.square().sum(axes, keep))),
    "ReduceLogSumExp": _out_of_autocast(_reduction(lambda x, axes, keep: x.logsumexp(axes, keep))),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Mean": mean,
    "Log": _out_of_autocast(_unary(torch.log)),
    "Reciprocal": _unary(torch.reciprocal),
    "Sign": _unary(torch.sign),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Not": _unary(torch.logical_not),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Mish": _unary(F.mish),
    "Swish": _unary(lambda x, alpha: x * torch.sigmoid(alpha * x), alpha=1.0),
    "Elu": _unary(F.elu, alpha=1.0),
    "Celu": _unary(F.celu, alpha=1.0),
    "Selu": _unary(
        lambda x, alpha, gamma: gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0.0))),
        alpha=1.6732632,
        gamma=1.0507010,
    ),
    "ThresholdedRelu": _unary(lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x)), alpha=1.0),
    "Equal": lambda attributes, inputs, opset: [torch.eq(*inputs)],
    "Greater": lambda attributes, inputs, opset: [torch.gt(*inputs)],
    "GreaterOrEqual": lambda attributes, inputs, opset: [torch.ge(*inputs)],
    "Less": lambda attributes, inputs, opset: [torch.lt(*inputs)],
    "LessOrEqual": lambda attributes, inputs, opset: [torch.le(*inputs)],
    "And": lambda attributes, inputs, opset: [torch.logical_and(*inputs)],
    "Or": lambda attributes, inputs, opset: [torch.logical_or(*inputs)],
}
"""Operators that gradients pass; BatchNormalization and Dropout are modules of torch's own instead."""
