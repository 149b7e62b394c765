"""Reads conv and linear nodes of an ONNX network into sites, or refuses them with a reason.

    Conv, ConvTranspose     channels on axis 1, any number of spatial axes
    Gemm, MatMul            constant on the right: channels on the last axis; on the left: on the last but one

A MatMul has no bias: a constant vector added behind it stays an Add of its own, so that a site is always one node
between its input and its output, which is what a walk over the network relies on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.core.site import Array, Geometry, Site, Stage
from passes.onnx_constants import Constant, Refusal, constant
from passes.onnx_surgery import Scope, Surgery

READ = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that may become sites."""

KIN = frozenset(
    {
        *READ,
        *("ConvInteger", "QLinearConv", "QLinearMatMul", "MatMulInteger", "DeformConv", "LSTM", "GRU", "RNN", "Einsum"),
        *("FusedConv", "FusedMatMul", "FusedGemm", "QGemm", "MatMulNBits", "DynamicQuantizeMatMul", "Attention"),
    }
)
"""Operators that hold weights to multiply with: each is a site or is kept with a reason."""

StaticDims = dict[tuple[str, str], tuple[int | None, ...]]
"""(scope path, tensor name) -> the dimensions that hold for every input size; None where they vary."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A site and what emission needs of its place.

    ``nodes`` go together when it is replaced. ``left``: the constant stands on the left. ``turned``: the node reads
    its input transposed. ``out_axis``: channels of the output, from the end for linear layers.
    """

    site: Site
    scope: Scope
    nodes: tuple[gs.Node, ...]
    source: gs.Tensor
    target: gs.Tensor
    dtype: np.dtype[Any]
    left: bool = False
    turned: bool = False
    out_axis: int = 1


def read(surgery: Surgery, scope: Scope, node: gs.Node, static: StaticDims) -> Reading:
    """The site at ``node``. Raises Refusal with the reason where it is none."""
    if node.domain:
        raise Refusal(f"operator of domain {node.domain}")
    if node.op not in READ:
        raise Refusal(_FOREIGN.get(node.op, f"{node.op} is not rewritten"))
    for owner in scope.owners:
        if owner not in ("If", "Loop"):
            raise Refusal(f"it stands in the body of a {owner}")
    try:
        if node.op in ("Conv", "ConvTranspose"):
            return _read_conv(surgery, scope, node, static)
        return _read_gemm(surgery, scope, node) if node.op == "Gemm" else _read_matmul(surgery, scope, node)
    except (ValueError, ArithmeticError, LookupError, TypeError) as error:
        raise Refusal(f"its attributes and shapes do not fit together: {error}") from error


def _read_conv(surgery: Surgery, scope: Scope, node: gs.Node, static: StaticDims) -> Reading:
    attributes = surgery.attributes(node)
    weight = _floats(constant(surgery, node.inputs[1]))
    bias = _bias(surgery, node, 2)
    x = _shape(node.inputs[0], "input")
    y = _shape(node.outputs[0], "output")
    n = weight.value.ndim - 2
    if n < 1 or len(x) != n + 2:
        raise Refusal(f"its weight has {weight.value.ndim} dimensions, its input {len(x)}")
    kernel = tuple(weight.value.shape[2:])
    if tuple(attributes.get("kernel_shape", kernel)) != kernel:
        raise Refusal(f"its kernel_shape is {attributes['kernel_shape']}, its weight's {list(kernel)}")
    transposed = node.op == "ConvTranspose"
    geometry = Geometry(
        kernel,
        tuple(attributes.get("strides", ())),
        tuple(attributes.get("dilations", ())),
        groups=attributes.get("group", 1),
        transposed=transposed,
        output_padding=tuple(attributes.get("output_padding", ())) if transposed else (),
    )
    dims = static.get((scope.path, node.inputs[0].name), ())
    fixed = len(dims) == n + 2 and None not in dims[2:]
    geometry = replace(geometry, pads=resolved_pads(geometry, attributes, x[2:], fixed))
    value = _output_first(weight.value, geometry.groups) if transposed else weight.value
    stage = Stage(value, None if bias is None else bias.astype(value.dtype), geometry)
    if (x[1], y[1]) != (stage.in_channels, stage.out_channels) or geometry.output_spatial(x[2:]) != tuple(y[2:]):
        raise Refusal(f"its attributes give {geometry.output_spatial(x[2:])} for {x}, the network says {y}")
    site = Site(
        node.name, node.op, stage, node.inputs[0].name, node.outputs[0].name, x, y, 1, bool(scope.path), weight.key
    )
    return Reading(site, scope, (node,), node.inputs[0], node.outputs[0], weight.dtype)


def resolved_pads(
    geometry: Geometry, attributes: dict[str, Any], spatial: tuple[int, ...], fixed: bool
) -> tuple[int, ...]:
    """Explicit pads (all begins, then all ends) for an input of ``spatial``.

    ``fixed``: whether that size holds for every run. Raises Refusal where the pads depend on it and it does not.
    """
    resolve = _transposed_pads if geometry.transposed else _pads
    return resolve(geometry, attributes, spatial, fixed)


def _pads(geometry: Geometry, attributes: dict[str, Any], spatial: tuple[int, ...], fixed: bool) -> tuple[int, ...]:
    mode = attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return tuple(attributes.get("pads", (0,) * (2 * geometry.ndim)))
    if mode == "VALID":
        return (0,) * (2 * geometry.ndim)
    if not fixed and any(s > 1 for s in geometry.strides):
        raise Refusal(f"its padding ({mode}) depends on an input size that varies")
    begin, end = [], []
    for size, k, s, d in zip(spatial, geometry.kernel, geometry.strides, geometry.dilations, strict=True):
        total = max((ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return (*begin, *end)


def _transposed_pads(
    geometry: Geometry, attributes: dict[str, Any], spatial: tuple[int, ...], fixed: bool
) -> tuple[int, ...]:
    """Pads of a transposed convolution; where an output size is asked for, they make up the difference to it."""
    mode = attributes.get("auto_pad", "NOTSET")
    wanted = attributes.get("output_shape")
    if wanted is None and mode in ("NOTSET", "VALID"):
        return tuple(attributes.get("pads", ()) if mode == "NOTSET" else ()) or (0,) * (2 * geometry.ndim)
    if not fixed and wanted is not None:
        raise Refusal("its padding follows from output_shape and an input size that varies")
    natural = geometry.output_spatial(spatial)
    if wanted is None:
        wanted = [size * s for size, s in zip(spatial, geometry.strides, strict=True)]
    begin, end = [], []
    for total in (have - want for have, want in zip(natural, wanted[-geometry.ndim :], strict=True)):
        if total < 0:
            raise Refusal("its output_shape is larger than its kernel reaches")
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return (*begin, *end)


def _output_first(weight: Array, groups: int) -> Array:
    """(I, O/groups, *kernel), as ONNX stores a transposed convolution, to (O, I/groups, *kernel)."""
    inputs, outputs, *kernel = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return split.swapaxes(1, 2).reshape(groups * outputs, inputs // groups, *kernel)


def _read_gemm(surgery: Surgery, scope: Scope, node: gs.Node) -> Reading:
    attributes = surgery.attributes(node)
    a, b = node.inputs[:2]
    left = _operand(surgery, node)
    turned_a, turned_b = bool(attributes.get("transA", 0)), bool(attributes.get("transB", 0))
    weight = _floats(constant(surgery, a if left else b))
    source = b if left else a
    x, y = _shape(source, "input"), _shape(node.outputs[0], "output")
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    value = weight.value.T if (turned_a if left else not turned_b) else weight.value
    if alpha != 1.0:
        value = (value * alpha).astype(value.dtype)
    out_axis = -2 if left else -1
    bias = _gemm_bias(surgery, node, y, out_axis)
    if bias is not None:
        bias = (bias * beta).astype(value.dtype)
    turned = turned_b if left else turned_a
    axis = out_axis if not turned else -3 - out_axis
    # A layer that turns its input has channels on different axes before and after, which a walk does not model.
    off_path = bool(scope.path) or turned
    site = Site(
        node.name, "Gemm", Stage(value, bias), source.name, node.outputs[0].name, x, y, axis, off_path, weight.key
    )
    return Reading(site, scope, (node,), source, node.outputs[0], weight.dtype, left, turned, out_axis)


def _gemm_bias(surgery: Surgery, node: gs.Node, y: tuple[int, ...], out_axis: int) -> Array | None:
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return None
    c = constant(surgery, node.inputs[2], "bias").value
    return along(c, y, out_axis, "its C")


def along(value: Array, shape: tuple[int, ...], axis: int, what: str) -> Array:
    """``value``, which is broadcast against ``shape``, as one number per entry of ``axis``. Raises Refusal."""
    if value.ndim > len(shape):
        raise Refusal(f"{what} has {value.ndim} dimensions, the output {len(shape)}")
    padded = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    axis %= len(shape)
    if any(n != 1 for i, n in enumerate(padded.shape) if i != axis) or padded.shape[axis] not in (1, shape[axis]):
        raise Refusal(f"{what} of shape {value.shape} is not one number per output channel")
    return np.broadcast_to(padded.reshape(-1), (shape[axis],)).copy()


def _read_matmul(surgery: Surgery, scope: Scope, node: gs.Node) -> Reading:
    left = _operand(surgery, node)
    source = node.inputs[1] if left else node.inputs[0]
    weight = _floats(constant(surgery, node.inputs[0] if left else node.inputs[1]))
    x, y = _shape(source, "input"), _shape(node.outputs[0], "output")
    value = weight.value
    if value.ndim < 2:
        raise Refusal("its constant is a vector")
    if prod(value.shape[:-2]) != 1 or value.ndim > max(len(x), 2):
        raise Refusal(f"its constant of shape {value.shape} is a batch of matrices")
    value = value.reshape(value.shape[-2:])
    if left and len(x) == 1:  # a vector on the right is a row on the left of the transposed matrix
        left, value = False, value.T
    out_axis = -2 if left else -1
    stage = Stage(value if left else value.T, None)
    target = node.outputs[0]
    site = Site(node.name, "MatMul", stage, source.name, target.name, x, y, out_axis, bool(scope.path), weight.key)
    return Reading(site, scope, (node,), source, target, weight.dtype, left, False, out_axis)


def _operand(surgery: Surgery, node: gs.Node) -> bool:
    """True if the constant operand is the left one. Raises Refusal where both or none are constant."""
    reasons = []
    found = []
    for index in (0, 1):
        try:
            constant(surgery, node.inputs[index])
            found.append(index)
        except Refusal as reason:
            reasons.append(str(reason))
    if len(found) == 2:
        raise Refusal("both operands are constant")
    if not found:
        special = next((r for r in reasons if "computes it" not in r and "is not a constant" not in r), None)
        raise Refusal(special or "both operands are computed")
    return found[0] == 0


def _floats(source: Constant) -> Constant:
    """The weight, which must be of floats."""
    if source.dtype.kind != "f":
        raise Refusal(f"its weight is of type {source.dtype}")
    return source


def _bias(surgery: Surgery, node: gs.Node, index: int) -> Array | None:
    if len(node.inputs) <= index or node.inputs[index].is_empty():
        return None
    return constant(surgery, node.inputs[index], "bias").value


def _shape(tensor: gs.Tensor, what: str) -> tuple[int, ...]:
    if tensor.shape is None:
        raise Refusal(f"the shape of its {what} is unknown")
    return tuple(tensor.shape)


_FOREIGN = {
    "LSTM": "recurrent layers are not rewritten",
    "GRU": "recurrent layers are not rewritten",
    "RNN": "recurrent layers are not rewritten",
    "ConvInteger": "its weight is quantized",
    "MatMulInteger": "its weight is quantized",
    "QLinearConv": "its weight is quantized",
    "QLinearMatMul": "its weight is quantized",
    "Einsum": "an Einsum is not rewritten",
    "DeformConv": "a deformable convolution is not rewritten",
}
