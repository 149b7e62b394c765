"""Conv, ConvTranspose, Gemm and MatMul with constant weights."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from codegen.quantized.graph import QConv, QTensor
from codegen.quantized.onnx_network import attributes
from codegen.quantized.reader import Reader
from codegen.quantized.views import QuantizedConstant, Refusal, Tail
from passes.core.site import Geometry

Array = NDArray[Any]


def conv(reader: Reader, index: int, node: NodeProto) -> None:
    x, weight = reader.plain(node.input[0]), _weight(reader, node)
    given = attributes(node)
    transposed = node.op_type == "ConvTranspose"
    groups = given.get("group", 1)
    values, scale = _centred(weight), weight.scale
    axis = 1 if transposed else 0
    if weight.axis not in (None, axis):
        raise Refusal("has weights with one scale per input channel")
    if transposed:
        # (I, O/g, *k) -> (O, I/g, *k)
        inputs, outputs = values.shape[:2]
        split = values.reshape(groups, inputs // groups, outputs, *values.shape[2:])
        values = np.swapaxes(split, 1, 2).reshape(groups * outputs, inputs // groups, *values.shape[2:])
        scale = np.tile(scale, groups) if weight.axis is not None else scale
    tail = reader.tail(node.output[0])
    shape = reader.network.shapes[node.output[0]]
    geometry = _geometry(given, values.shape[2:], groups, transposed, x.shape[2:], shape[2:])
    _finish(reader, node, x, values, scale, np.float32(1), tail, geometry, node.output[0], 1.0)


def gemm(reader: Reader, index: int, node: NodeProto) -> None:
    x, weight = reader.plain(node.input[0]), _weight(reader, node)
    given = attributes(node)
    if given.get("transA", 0):
        raise Refusal("has a transposed input")
    transposed = bool(given.get("transB", 0))
    if weight.axis not in (None, 0 if transposed else 1):
        raise Refusal("has weights with one scale per input feature")
    values = _centred(weight)
    values = values if transposed else np.ascontiguousarray(values.T)
    tail = reader.tail(node.output[0])
    alpha, beta = np.float32(given.get("alpha", 1.0)), float(given.get("beta", 1.0))
    _finish(reader, node, x, values, weight.scale, alpha, tail, Geometry(), node.output[0], beta)


def matmul(reader: Reader, index: int, node: NodeProto) -> None:
    if reader.constant(node.input[0]) is not None:
        raise Refusal("has a constant as its left operand")
    x, weight = reader.plain(node.input[0]), _weight(reader, node)
    if weight.values.ndim != 2 or len(x.shape) < 2:
        raise Refusal(f"multiplies shapes {x.shape} and {weight.values.shape}; a layer is (..., K) by (K, N)")
    if weight.axis not in (None, 1):
        raise Refusal("has weights with one scale per input feature")
    values = np.ascontiguousarray(_centred(weight).T)
    tail = reader.tail(node.output[0])
    _finish(reader, node, x, values, weight.scale, np.float32(1), tail, Geometry(), node.output[0], 1.0)


def _weight(reader: Reader, node: NodeProto) -> QuantizedConstant:
    weight = reader.quantized_constant(node.input[1])
    if weight is None:
        if node.input[1] in reader.network.constants:
            raise Refusal("has weights in floats: they were not quantized")
        raise Refusal("has weights that are computed")
    if weight.values.dtype not in (np.int8, np.uint8):
        raise Refusal(f"has weights of {weight.values.dtype}, neither int8 nor uint8")
    return weight


def _centred(weight: QuantizedConstant) -> NDArray[np.int8]:
    shape = [1] * weight.values.ndim
    if weight.axis is not None and weight.zero.size > 1:
        shape[weight.axis] = -1
    centred = weight.values.astype(np.int64) - weight.zero.reshape(shape)
    if centred.min(initial=0) < -128 or centred.max(initial=0) > 127:
        raise Refusal("has weights that do not fit int8 once their zero point is taken off")
    return centred.astype(np.int8)


def _geometry(
    given: dict[str, Any],
    kernel: tuple[int, ...],
    groups: int,
    transposed: bool,
    source: tuple[int, ...],
    target: tuple[int, ...],
) -> Geometry:
    n = len(kernel)
    strides = tuple(given.get("strides", (1,) * n))
    dilations = tuple(given.get("dilations", (1,) * n))
    pads = tuple(given.get("pads", (0,) * 2 * n))
    extra = tuple(given.get("output_padding", (0,) * n))
    auto = given.get("auto_pad", "NOTSET")
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    if auto in ("SAME_UPPER", "SAME_LOWER") or (transposed and "output_shape" in given):
        if transposed:
            totals = [
                (i - 1) * s + r + e - o for i, s, r, e, o in zip(source, strides, reach, extra, target, strict=True)
            ]
        else:
            totals = [max((o - 1) * s + r - i, 0) for i, s, r, o in zip(source, strides, reach, target, strict=True)]
        if transposed:
            # What the kernel does not reach is as if it were padding of the output.
            extra = tuple(e + max(-t, 0) for e, t in zip(extra, totals, strict=True))
            totals = [max(t, 0) for t in totals]
        # Of an odd total, SAME_UPPER puts the larger part at the end; a transposed convolution anywhere else does not.
        late = auto == "SAME_UPPER"
        begins = [t // 2 if late else t - t // 2 for t in totals]
        pads = (*begins, *(t - b for t, b in zip(totals, begins, strict=True)))
    elif auto == "VALID":
        pads = (0,) * 2 * n
    geometry = Geometry(kernel, strides, dilations, pads, groups, transposed, extra if transposed else ())
    if geometry.output_spatial(source) != target:
        raise Refusal(f"gives a map of {target}, its attributes say {geometry.output_spatial(source)}")
    return geometry


def _finish(
    reader: Reader,
    node: NodeProto,
    x: QTensor,
    weight: NDArray[np.int8],
    scale: NDArray[np.float32],
    alpha: np.float32,
    tail: Tail,
    geometry: Geometry,
    output: str,
    beta: float,
) -> None:
    product = alpha * np.float32(x.scale) * scale.astype(np.float32)
    multipliers = product / np.float32(tail.scaling.scale)
    bias = _bias(reader, node, len(weight), product, beta)
    operation = QConv(
        node.name, node.op_type, x.name, tail.outputs[0], geometry, weight, bias, multipliers.astype(np.float32),
        tail.low, tail.high, (node.name, *tail.nodes),
    )  # fmt: skip
    reader.finish(operation, tail, reader.network.shapes[output], clamped=True)


def _bias(
    reader: Reader, node: NodeProto, outputs: int, product: NDArray[np.float32], beta: float
) -> NDArray[np.int32] | None:
    """The bias in units of the accumulator: the integers as they are, floats divided and rounded."""
    name = node.input[2] if len(node.input) > 2 else ""
    if not name or beta == 0:
        return None
    found = reader.quantized_constant(name)
    value = reader.constant(name)
    if value is None:
        raise Refusal("has a bias that is computed")
    if prod(value.shape[:-1]) != 1 or value.size not in (1, outputs):
        raise Refusal(f"has a bias of shape {value.shape}, not one value per output")
    if found is not None and beta == 1 and not found.zero.any() and found.values.dtype == np.int32:
        # The quantizer's own scale is that of the product; it may differ in the last bits.
        wide = np.broadcast_to(found.scale, product.shape) if found.scale.size == 1 else found.scale
        if wide.shape == product.shape and np.allclose(wide, product, rtol=1e-5, atol=0):
            return np.broadcast_to(found.values.reshape(-1), (outputs,)).astype(np.int32)
    with np.errstate(divide="ignore", over="ignore"):
        units = np.rint(np.float32(beta) * value.reshape(-1).astype(np.float32) / product)
    limits = np.iinfo(np.int32)
    if not np.isfinite(units).all() or units.min() < limits.min or units.max() > limits.max:
        raise Refusal("has a bias too large for its scale")
    return np.broadcast_to(units, (outputs,)).astype(np.int32)
