"""The operations of an integer network in NumPy, one after another: the definition of what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.quantized.graph import (
    Pool,
    QConv,
    QHost,
    QMove,
    QOperation,
    QPool,
    QProduct,
    QReshape,
    QSum,
    QTable,
    QTensor,
    QuantizedGraph,
    average_multiplier,
)
from codegen.quantized.operands import reads, writes
from passes.errors import InputError

Array = NDArray[Any]


def run_quantized(graph: QuantizedGraph, inputs: Mapping[str, Array], keep: Iterable[str] = ()) -> dict[str, Array]:
    """Values of the network's outputs and of the tensors ``keep``, by the names of ``graph.tensors``.

    ``inputs``: bytes by the names of ``graph.inputs`` (see :func:`quantized_inputs` for floats), (N * B, ...) where the
    network has a leading B: N samples at once, or one after another where the network mixes samples. Raises InputError
    where an input is missing, is of another type or shape, or ``keep`` names no tensor.
    """
    samples = _samples(graph, inputs)
    keep = tuple(keep)
    known = graph.tensors.keys() | graph.host_tensors.keys()
    for name in keep:
        if name not in known:
            raise InputError(f"no tensor is called {name!r}")
    if samples == 1 or _is_batchable(graph):
        return _run(graph, dict(inputs), samples, keep)
    parts = []
    for sample in range(samples):
        one = {}
        for name, value in inputs.items():
            rows = len(value) // samples
            one[name] = value[sample * rows : (sample + 1) * rows]
        parts.append(_run(graph, one, 1, keep))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def quantized_inputs(graph: QuantizedGraph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """``feeds`` of the network, by ``graph.input_names``, as the bytes that ``run_quantized`` takes."""
    found = {}
    for tensor, name, is_float in zip(graph.inputs, graph.input_names, graph.float_inputs, strict=True):
        if name not in feeds:
            raise InputError(f"the input {name!r} is missing")
        found[tensor] = quantize_array(feeds[name], graph.tensors[tensor]) if is_float else np.asarray(feeds[name])
    return found


def dequantized_outputs(graph: QuantizedGraph, values: Mapping[str, Array]) -> dict[str, Array]:
    """What ``run_quantized`` gave as the network's own outputs, by ``graph.output_names``."""
    return {
        name: dequantize_array(values[tensor], graph.tensors[tensor]) if is_float else values[tensor]
        for tensor, name, is_float in zip(graph.outputs, graph.output_names, graph.float_outputs, strict=True)
    }


def quantize_array(values: Array, tensor: QTensor) -> Array:
    """QuantizeLinear: ``clamp(rint(values / scale) + zero_point)``."""
    with np.errstate(over="ignore"):
        return _saturate(np.rint(values.astype(np.float32) / np.float32(tensor.scale)) + tensor.zero_point, tensor)


def dequantize_array(values: Array, tensor: QTensor) -> NDArray[np.float32]:
    """DequantizeLinear: ``(values - zero_point) * scale``."""
    return (values.astype(np.int32) - tensor.zero_point).astype(np.float32) * np.float32(tensor.scale)


def _samples(graph: QuantizedGraph, inputs: Mapping[str, Array]) -> int:
    counts = set()
    for name in graph.inputs:
        if name not in inputs:
            raise InputError(f"the input {name!r} is missing")
        value = np.asarray(inputs[name])
        if name in graph.tensors:
            shape: tuple[int, ...] = graph.tensors[name].shape
            dtype = np.dtype(np.int8 if graph.tensors[name].signed else np.uint8)
        else:
            shape, dtype = graph.host_tensors[name].shape, np.dtype(graph.host_tensors[name].dtype)
        fits = value.ndim == len(shape) and value.shape[1:] == shape[1:]
        if value.dtype != dtype or not fits or (shape and (not len(value) or len(value) % shape[0])):
            raise InputError(
                f"the input {name!r} is {value.dtype} {value.shape}, expected {dtype} {shape} or a multiple"
            )
        counts.add(len(value) // shape[0] if shape else 1)
    if len(counts) > 1:
        raise InputError(f"inputs hold different numbers of samples: {sorted(counts)}")
    return counts.pop() if counts else 1


def _is_batchable(graph: QuantizedGraph) -> bool:
    """True if samples never meet: every tensor that depends on the input leads with the same extent, and keeps it."""
    leads = {graph.tensors[name].shape[:1] for name in graph.tensors if name not in graph.constants}
    leads |= {tensor.shape[:1] for tensor in graph.host_tensors.values()}
    if len(leads) != 1 or leads == {()}:
        return False
    if any(value.shape[:1] != (1,) for value in graph.constants.values() if value.ndim):
        return False
    (batch,) = next(iter(leads))
    for operation in graph.operations:
        if isinstance(operation, QMove):
            whole = all(
                p.begin[0] == p.source_begin[0] == 0 and p.shape[0] == batch and (p.source_step[0] == 1 or batch == 1)
                and p.input not in graph.constants
                for p in operation.pieces
            )  # fmt: skip
            if not whole or (operation.permutation is not None and operation.permutation[0] != 0):
                return False
        if isinstance(operation, QReshape) and batch != 1:
            return False
        if isinstance(operation, QSum | QProduct):
            ranks = {len(graph.tensors[name].shape) for name in (operation.a, operation.b)}
            constant = operation.a in graph.constants or operation.b in graph.constants
            if len(ranks) > 1 and not constant:
                return False
    return True


def _run(graph: QuantizedGraph, values: dict[str, Array], samples: int, keep: tuple[str, ...]) -> dict[str, Array]:
    wanted = (*graph.outputs, *keep)
    last: dict[str, int] = {}
    for place, operation in enumerate(graph.operations):
        last.update(dict.fromkeys(reads(operation), place))
    values.update(graph.constants)
    for place, operation in enumerate(graph.operations):
        found = execute(graph, operation, values, samples)
        values.update(zip(writes(operation), found, strict=True))
        for name in reads(operation):
            if last[name] == place and name not in wanted:
                del values[name]
    return {name: values[name] for name in wanted}


def execute(
    graph: QuantizedGraph, operation: QOperation, values: Mapping[str, Array], samples: int = 1
) -> tuple[Array, ...]:
    """One operation on ``values``, which hold ``samples`` samples; its outputs in order."""
    tensors = graph.tensors
    if isinstance(operation, QConv):
        return (conv_of(graph, operation, values[operation.input]),)
    if isinstance(operation, QSum):
        return (sum_of(graph, operation, values[operation.a], values[operation.b]),)
    if isinstance(operation, QProduct):
        return (product_of(graph, operation, values[operation.a], values[operation.b]),)
    if isinstance(operation, QTable):
        table = np.frombuffer(operation.table, np.int8 if tensors[operation.output].signed else np.uint8)
        return (table[np.ascontiguousarray(values[operation.input]).view(np.uint8)],)
    if isinstance(operation, QPool):
        return (pool_of(graph, operation, values[operation.input]),)
    if isinstance(operation, QMove):
        return (move_of(graph, operation, values, samples),)
    if isinstance(operation, QReshape):
        shape = tensors[operation.output].shape
        return (values[operation.input].reshape((shape[0] * samples, *shape[1:]) if shape else shape),)
    return host_of(graph, operation, values, samples)


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
    limited: Array = np.clip(scaled, operation.low, operation.high).astype(_dtype(y))
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
    return np.clip(total, operation.low, operation.high).astype(_dtype(graph.tensors[operation.output]))


def product_of(graph: QuantizedGraph, operation: QProduct, a: Array, b: Array) -> Array:
    left = a.astype(np.int32) - graph.tensors[operation.a].zero_point
    right = b.astype(np.int32) - graph.tensors[operation.b].zero_point
    y = graph.tensors[operation.output]
    scaled = (left * right).astype(np.float32) * np.float32(operation.ratio)
    return _saturate(np.rint(scaled + np.float32(y.zero_point)), y)


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
        return total.astype(_dtype(y))
    if operation.count_padding:
        count[...] = prod(operation.kernel)
    # A window of padding alone sums to 0, whatever it is divided by.
    kinds, place = np.unique(np.maximum(count, 1), return_inverse=True)
    multipliers = np.array([average_multiplier(tensor, y, int(kind)) for kind in kinds], np.float32)
    scaled = total.astype(np.float32) * multipliers[place].reshape(target)
    return _saturate(np.rint(scaled) + y.zero_point, y)


def move_of(graph: QuantizedGraph, operation: QMove, values: Mapping[str, Array], samples: int) -> Array:
    y = graph.tensors[operation.output]
    out = np.full((y.shape[0] * samples, *y.shape[1:]), 0 if operation.fill is None else operation.fill, _dtype(y))
    for piece in operation.pieces:
        source = values[piece.input]
        if operation.permutation is not None:
            source = source.transpose(operation.permutation)
        steps = piece.step or (1,) * len(piece.shape)
        whole = samples > 1
        places, found = [], []
        for axis, extent in enumerate(piece.shape):
            i = np.arange(extent)
            if axis == 0 and whole:
                i = np.arange(source.shape[0])
            places.append(piece.begin[axis] + i * steps[axis])
            found.append(i if axis == 0 and whole else piece.source_begin[axis] + i * piece.source_step[axis])
        out[np.ix_(*places)] = source[np.ix_(*found)]
    return out


def host_of(graph: QuantizedGraph, operation: QHost, values: Mapping[str, Array], samples: int) -> tuple[Array, ...]:
    """A host part by onnxruntime, sample by sample, quantizing and dequantizing in the same session."""
    from codegen.quantized.host_session import host_session

    session = host_session(graph, operation)
    found: list[list[Array]] = []
    for sample in range(samples):
        feeds = {}
        for name in operation.inputs:
            rows = len(values[name]) // samples if values[name].ndim else 0
            feeds[name] = values[name][sample * rows : (sample + 1) * rows] if rows else values[name]
        found.append(session(feeds))
    return tuple(np.concatenate(column) if samples > 1 else column[0] for column in zip(*found, strict=True))


def _dtype(tensor: QTensor) -> type[np.int8 | np.uint8]:
    return np.int8 if tensor.signed else np.uint8


def _saturate(values: Array, tensor: QTensor) -> Array:
    return np.clip(values, *tensor.limits).astype(_dtype(tensor))
