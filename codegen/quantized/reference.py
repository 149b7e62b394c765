"""The operations of an integer network in NumPy, one after another: the definition of what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.quantized.arithmetic import byte_dtype, conv_of, pool_of, product_of, saturate, sum_of
from codegen.quantized.graph import (
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
        return saturate(np.rint(values.astype(np.float32) / np.float32(tensor.scale)) + tensor.zero_point, tensor)


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


def move_of(graph: QuantizedGraph, operation: QMove, values: Mapping[str, Array], samples: int) -> Array:
    y = graph.tensors[operation.output]
    out = np.full((y.shape[0] * samples, *y.shape[1:]), 0 if operation.fill is None else operation.fill, byte_dtype(y))
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
