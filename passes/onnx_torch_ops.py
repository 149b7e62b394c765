"""ONNX operators on torch tensors, for walking a network with gradients.

A function takes the node's attributes, its inputs (None where left out) and the opset; it returns the outputs, or
None when this node uses something it does not cover, and the walk then falls back to onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from onnx import numpy_helper

from passes.onnx_attributes import Attributes
from passes.onnx_torch_resize import resize

Tensor = torch.Tensor
Inputs = Sequence[Tensor | None]
Op = Callable[[Attributes, Any, int], Sequence[Tensor] | None]


def _pad(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    n = len(pads) // 2
    flat = [p for axis in reversed(range(n)) for p in (pads[axis], pads[axis + n])]
    return F.pad(x, flat, value=value) if any(flat) else x


def conv(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, weight, bias = [*inputs, None][:3]
    assert x is not None and weight is not None
    n = weight.ndim - 2
    pads = attributes.pads(n)
    if pads is None or n > 3 or x.dtype != torch.float32:
        return None
    strides, dilations = attributes.get("strides", [1] * n), attributes.get("dilations", [1] * n)
    symmetric = pads[:n] == pads[n:]
    if not symmetric:
        x = _pad(x, pads)
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    padding = pads[:n] if symmetric else 0
    return [run(x, weight, bias, strides, padding, dilations, attributes.get("group", 1))]


def conv_transpose(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, weight, bias = [*inputs, None][:3]
    assert x is not None and weight is not None
    n = weight.ndim - 2
    if n > 3 or x.dtype != torch.float32:
        return None
    strides, dilations = attributes.get("strides", [1] * n), attributes.get("dilations", [1] * n)
    extra = attributes.get("output_padding", [0] * n)
    run: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    y = run(x, weight, None, strides, 0, 0, attributes.get("group", 1), dilations)
    y = _pad(y, [0] * n + list(extra))
    wanted = attributes.get("output_shape", None)
    pads = attributes.pads(n)
    if wanted is None and pads is None:
        wanted = [size * s for size, s in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        total = [have - want for have, want in zip(y.shape[2:], wanted[-n:], strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*small, *large] if attributes.get("auto_pad", "NOTSET") == "SAME_UPPER" else [*large, *small]
    assert pads is not None
    if any(p < 0 for p in pads):
        return None
    y = _pad(y, [-p for p in pads])
    return [y if bias is None else y + bias.reshape(-1, *(1,) * n)]


def layer_norm(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, scale, shift = [*inputs, None][:3]
    assert x is not None and scale is not None
    if x.dtype != torch.float32:
        return None
    axes = tuple(range(attributes.get("axis", -1) % x.ndim, x.ndim))
    mean = x.mean(dim=axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt(centred.square().mean(dim=axes, keepdim=True) + attributes.get("epsilon", 1e-5))
    y = centred * inverse * scale
    return [y if shift is None else y + shift, mean, inverse]


def gelu(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    return [F.gelu(inputs[0], approximate=attributes.get("approximate", "none"))]  # type: ignore[arg-type]


def gemm(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    a, b, c = [*inputs, None][:3]
    assert a is not None and b is not None
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    y = attributes.get("alpha", 1.0) * (a @ b)
    return [y if c is None else y + attributes.get("beta", 1.0) * c]


def batch_norm(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, scale, shift, mean, var = inputs
    assert x is not None and scale is not None
    if attributes.get("training_mode", 0):
        return None
    return [F.batch_norm(x, mean, var, scale, shift, False, 0.0, attributes.get("epsilon", 1e-5))]


def max_pool(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    kernel = attributes.get("kernel_shape", [])
    n = len(kernel)
    pads = attributes.pads(n)
    if pads is None or attributes.get("ceil_mode", 0) or n > 3:
        return None
    x = inputs[0]
    assert x is not None
    if any(pads):
        x = _pad(x, pads, float("-inf"))
    run: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
    return [run(x, kernel, attributes.get("strides", [1] * n), 0, attributes.get("dilations", [1] * n))]


def average_pool(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    kernel = attributes.get("kernel_shape", [])
    n = len(kernel)
    pads = attributes.pads(n)
    counted = bool(attributes.get("count_include_pad", 0))
    if pads is None or attributes.get("ceil_mode", 0) or n > 3 or (any(pads) and not counted):
        return None
    if any(d != 1 for d in attributes.get("dilations", [1] * n)):
        return None
    x = inputs[0]
    assert x is not None
    run: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    return [run(_pad(x, pads), kernel, attributes.get("strides", [1] * n))]


def global_average_pool(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    return [x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)]


def reduce_mean(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, axes = [*inputs, None][:2]
    assert x is not None
    if not x.is_floating_point():
        return None
    listed = attributes.get("axes", None) if axes is None else [int(a) for a in axes]
    if not listed and attributes.get("noop_with_empty_axes", 0):
        return [x]
    return [x.mean(dim=tuple(listed or range(x.ndim)), keepdim=bool(attributes.get("keepdims", 1)))]


def reshape(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, shape = [*inputs, None][:2]
    assert x is not None
    if shape is None or (attributes.get("allowzero", 0) and bool((shape == 0).any())):
        return None
    return [x.reshape([x.shape[i] if s == 0 else s for i, s in enumerate(shape.tolist())])]


def flatten(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    axis = attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return [x.reshape(rows, -1)]


def transpose(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    return [x.permute(attributes.get("perm", list(reversed(range(x.ndim)))))]


def concat(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    return [torch.cat([x for x in inputs if x is not None], dim=attributes.get("axis", 1))]


def clip(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, low, high = [*inputs, None, None][:3]
    assert x is not None
    low = attributes.get("min", None) if len(inputs) == 1 else low
    high = attributes.get("max", None) if len(inputs) == 1 else high
    return [x if low is None and high is None else torch.clamp(x, low, high)]


def softmax(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    if opset < 13:
        axis = attributes.get("axis", 1) % x.ndim
        flat = x.reshape(prod(x.shape[:axis]), -1)
        return [torch.softmax(flat, 1).reshape(x.shape)]
    return [torch.softmax(x, attributes.get("axis", -1))]


def squeeze(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, axes = [*inputs, None][:2]
    assert x is not None
    listed = attributes.get("axes", None) if axes is None else axes.tolist()
    return [x.squeeze() if listed is None else x.squeeze(tuple(listed))]


def unsqueeze(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, axes = [*inputs, None][:2]
    assert x is not None
    listed = attributes.get("axes", None) if axes is None else axes.tolist()
    for axis in sorted(a % (x.ndim + len(listed)) for a in listed):
        x = x.unsqueeze(axis)
    return [x]


def slice_(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, *rest = inputs
    assert x is not None
    if rest:
        given = [None if v is None else v.tolist() for v in rest]
        starts, ends = given[0] or [], given[1] or []
        axes, steps = [*given[2:], None, None][:2]
    else:
        starts, ends = attributes.get("starts", []), attributes.get("ends", [])
        axes, steps = attributes.get("axes", None), None
    axes = axes or list(range(len(starts)))
    steps = steps or [1] * len(starts)
    if any(step < 1 for step in steps):
        return None
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return [x[tuple(index)]]


def pad(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    if attributes.get("mode", "constant") != "constant" or opset < 11:
        return None
    x, pads, value, axes = [*inputs, None, None][:4]
    assert x is not None and pads is not None
    if axes is not None:
        return None
    return [_pad(x, pads.tolist(), 0.0 if value is None else float(value))]


def gather(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, indices = inputs
    assert x is not None and indices is not None
    axis = attributes.get("axis", 0) % x.ndim
    at = indices.reshape(-1).long()
    at = torch.where(at < 0, at + x.shape[axis], at)
    return [x.index_select(axis, at).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])]


def split(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, given = [*inputs, None][:2]
    assert x is not None
    axis = attributes.get("axis", 0) % x.ndim
    sizes = attributes.get("split", None) if given is None else given.tolist()
    if sizes is None:  # evenly; since opset 18 the last part may be smaller
        count, size = attributes.get("num_outputs", attributes.outputs), x.shape[axis]
        each = -(-size // count)
        sizes = [*[each] * (count - 1), size - each * (count - 1)]
    if min(sizes) < 0 or sum(sizes) != x.shape[axis]:
        return None
    return list(torch.split(x, list(sizes), axis))


def where(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    condition, x, y = inputs
    assert condition is not None and x is not None and y is not None
    return [torch.where(condition, x, y)]


def divide(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, y = inputs
    assert x is not None and y is not None
    if opset < 7:
        return None
    return [x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")]


def total(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    return [reduce(torch.add, [x for x in inputs if x is not None])] if opset >= 8 else None


def leaky_relu(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    return [F.leaky_relu(x, attributes.get("alpha", 0.01))]


def prelu(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x, slope = inputs
    assert x is not None and slope is not None
    return [torch.where(x < 0, x * slope, x)]


def hard_sigmoid(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    x = inputs[0]
    assert x is not None
    return [torch.clamp(attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5), 0, 1)]


def constant(attributes: Attributes, inputs: Inputs, opset: int) -> list[Tensor] | None:
    value = attributes.get("value", None)
    return None if value is None else [torch.from_numpy(numpy_helper.to_array(value).copy())]


def _unary(function: Callable[[Tensor], Tensor]) -> Op:
    return lambda attributes, inputs, opset: [function(inputs[0])]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return lambda attributes, inputs, opset: [function(inputs[0], inputs[1])] if opset >= 7 else None


OPS: dict[str, Op] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": _binary(torch.matmul),
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "ReduceMean": reduce_mean,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Concat": concat,
    "Clip": clip,
    "Softmax": softmax,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Slice": slice_,
    "Pad": pad,
    "Gather": gather,
    "Split": split,
    "Where": where,
    "Resize": resize,
    "Upsample": resize,
    "Gelu": gelu,
    "LeakyRelu": leaky_relu,
    "PRelu": prelu,
    "HardSigmoid": hard_sigmoid,
    "Constant": constant,
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Exp": _unary(torch.exp),
    "Sqrt": _unary(torch.sqrt),
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Erf": _unary(torch.erf),
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": divide,
    "Sum": total,
    "Pow": _binary(lambda x, y: torch.pow(x, y).to(x.dtype)),
}

IN_PLACE: dict[str, Callable[..., Tensor]] = {"Relu": torch.relu_, "Add": lambda x, y: x.add_(y)}
"""Operators that can write their result over an input of the same shape."""
