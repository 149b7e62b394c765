"""What the operations of an integer network calculate, in NumPy: sums of products, sums, products, pools."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.quantized.graph import Pool, QConv, QPool, QProduct, QSum, QTensor, QuantizedGraph, average_multiplier

Array = NDArray[Any]


def conv_of(graph: QuantizedGraph, operation: QConv, x: Array) -> Array:
    """(N, I, axes...) -> (N, O, axes...), or (..., I) -> (..., O)."""
    tensor, y = graph.tensors[operation.input], graph.tensors[operation.output]
    centred = x.astype(np.float64) - tensor.zero_point
    geometry = operation.geometry
    outputs = len(operation.weight)
    # Sums of products of bytes are below 2^53, so float64 holds them exactly.
    weight = operation.weight.astype(np.float64)
    if geometry.ndim == 0:
        sums = centred @ weight.T
        axis = -1
    else:
        spread = _transposed if geometry.transposed else _gathered
        sums = spread(operation, centred, weight)
        axis = 1
    wide = [1] * sums.ndim
    wide[axis] = outputs
    total = sums.astype(np.int64)
    if operation.bias is not None:
        total += operation.bias.astype(np.int64).reshape(wide)
    narrow = total.astype(np.int32)  # wraps as the accumulators do
    multipliers = np.broadcast_to(operation.multipliers, (outputs,)).reshape(wide)
    scaled = np.rint(narrow.astype(np.float32) * multipliers) + y.zero_point
    limited: Array = np.clip(scaled, operation.low, operation.high).astype(byte_dtype(y))
    return limited


def _gathered(operation: QConv, x: Array, weight: Array) -> Array:
    geometry, n = operation.geometry, operation.geometry.ndim
    groups = geometry.groups
    samples, channels = x.shape[:2]
    target = geometry.output_spatial(x.shape[2:])
    pads = [(0, 0), (0, 0), *zip(geometry.pads[:n], geometry.pads[n:], strict=True)]
    padded = np.pad(x, pads)
    per, out = channels // groups, len(weight) // groups
    sums = np.zeros((samples, groups, out, prod(target)))
    for tap in np.ndindex(*geometry.kernel):
        begin = [t * d for t, d in zip(tap, geometry.dilations, strict=True)]
        window = tuple(
            slice(b, b + (size - 1) * s + 1, s) for b, size, s in zip(begin, target, geometry.strides, strict=True)
        )
        part = padded[(slice(None), slice(None), *window)].reshape(samples, groups, per, prod(target))
        sums += np.matmul(weight[(..., *tap)].reshape(groups, out, per), part)
    return sums.reshape(samples, len(weight), *target)


def _transposed(operation: QConv, x: Array, weight: Array) -> Array:
    geometry, n = operation.geometry, operation.geometry.ndim
    groups = geometry.groups
    samples, channels, *source = x.shape
    target = geometry.output_spatial(tuple(source))
    per, out = channels // groups, len(weight) // groups
    reach = [
        max((i - 1) * s + d * (k - 1) + 1, t + b)
        for i, s, d, k, t, b in zip(
            source, geometry.strides, geometry.dilations, geometry.kernel, target, geometry.pads[:n], strict=True
        )
    ]
    sums = np.zeros((samples, len(weight), *reach))
    flat = x.reshape(samples, groups, per, prod(source))
    for tap in np.ndindex(*geometry.kernel):
        part = np.matmul(weight[(..., *tap)].reshape(groups, out, per), flat).reshape(samples, len(weight), *source)
        window = tuple(
            slice(t * d, t * d + (i - 1) * s + 1, s)
            for t, d, i, s in zip(tap, geometry.dilations, source, geometry.strides, strict=True)
        )
        sums[(slice(None), slice(None), *window)] += part
    crop = tuple(slice(b, b + t) for b, t in zip(geometry.pads[:n], target, strict=True))
    cropped: Array = sums[(slice(None), slice(None), *crop)]
    return cropped


def fma(a: Array, b: float, c: Array | np.float32) -> NDArray[np.float32]:
    """``a * b + c`` rounded once to float32: a is a byte and b and c are float32, so float64 holds the product."""
    return (a.astype(np.float64) * np.float64(np.float32(b)) + c).astype(np.float32)


def sum_of(graph: QuantizedGraph, operation: QSum, a: Array, b: Array) -> Array:
    inner = fma(b, operation.b_ratio, np.float32(operation.offset))
    total = np.rint(fma(a, operation.a_ratio, inner))
    return np.clip(total, operation.low, operation.high).astype(byte_dtype(graph.tensors[operation.output]))


def product_of(graph: QuantizedGraph, operation: QProduct, a: Array, b: Array) -> Array:
    left = a.astype(np.int32) - graph.tensors[operation.a].zero_point
    right = b.astype(np.int32) - graph.tensors[operation.b].zero_point
    y = graph.tensors[operation.output]
    scaled = (left * right).astype(np.float32) * np.float32(operation.ratio)
    return saturate(np.rint(scaled + np.float32(y.zero_point)), y)


def pool_of(graph: QuantizedGraph, operation: QPool, x: Array) -> Array:
    tensor, y = graph.tensors[operation.input], graph.tensors[operation.output]
    target = y.shape[2:]
    n = len(operation.kernel)
    least = tensor.limits[0]
    pads = [(0, 0), (0, 0), *zip(operation.pads[:n], operation.pads[n:], strict=True)]
    average = operation.kind is Pool.AVERAGE
    padded = np.pad(
        x.astype(np.int32) - tensor.zero_point if average else x, pads, constant_values=0 if average else least
    )
    inside = np.pad(np.ones(x.shape[2:], np.int64), pads[2:])
    total: Array | None = None
    count = np.zeros(target, np.int64)
    for tap in np.ndindex(*operation.kernel):
        window = tuple(
            slice(t * d, t * d + (size - 1) * s + 1, s)
            for t, d, size, s in zip(tap, operation.dilations, target, operation.strides, strict=True)
        )
        part = padded[(slice(None), slice(None), *window)]
        count += inside[window]
        if total is None:
            total = part.copy()
        elif average:
            total += part
        else:
            np.maximum(total, part, out=total)
    assert total is not None
    if not average:
        return total.astype(byte_dtype(y))
    if operation.count_padding:
        count[...] = prod(operation.kernel)
    # A window of padding alone sums to 0, whatever it is divided by.
    kinds, place = np.unique(np.maximum(count, 1), return_inverse=True)
    multipliers = np.array([average_multiplier(tensor, y, int(kind)) for kind in kinds], np.float32)
    scaled = total.astype(np.float32) * multipliers[place].reshape(target)
    return saturate(np.rint(scaled) + y.zero_point, y)


def byte_dtype(tensor: QTensor) -> type[np.int8 | np.uint8]:
    return np.int8 if tensor.signed else np.uint8


def saturate(values: Array, tensor: QTensor) -> Array:
    limited: Array = np.clip(values, *tensor.limits).astype(byte_dtype(tensor))
    return limited
