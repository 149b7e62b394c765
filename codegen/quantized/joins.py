"""Moves that bring bytes of several sources together: Pad and Concat."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from codegen.quantized.elementwise import requantized
from codegen.quantized.graph import Piece, QMove
from codegen.quantized.moves import gathered, integers, view_of
from codegen.quantized.onnx_network import attributes
from codegen.quantized.reader import Reader
from codegen.quantized.views import Refusal, Scaling

Array = NDArray[Any]


def pad(reader: Reader, index: int, node: NodeProto) -> None:
    view, given = view_of(reader, node.input[0]), attributes(node)
    shape, output = reader.tensors[view.tensor].shape, node.output[0]
    pads = given.get("pads") or integers(reader, node.input[1], "pads")
    axes = list(range(len(shape)))
    if len(node.input) > 3 and node.input[3]:
        axes = [a % len(shape) for a in integers(reader, node.input[3], "axes")]
    begins, ends = [0] * len(shape), [0] * len(shape)
    for i, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[i], pads[i + len(axes)]
    mode = given.get("mode", "constant")
    if mode != "constant":
        modes = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
        if min(*begins, *ends) < 0 or mode not in modes:
            raise Refusal(f"pads by {mode}, or crops")
        widths = list(zip(begins, ends, strict=True))
        maps = [np.pad(np.arange(s), w, modes[mode]) for s, w in zip(shape, widths, strict=True)]  # type: ignore[call-overload]
        gathered(reader, index, node, view, output, maps)
        return
    value: Array | float | None = given.get("value", 0.0)
    if len(node.input) > 2 and node.input[2]:
        value = reader.constant(node.input[2])
        if value is None:
            raise Refusal("pads with a value that is computed")
    number = float(np.asarray(value).reshape(()))
    target = reader.scaling_of(view.tensor)
    source = view.tensor
    names: tuple[str, ...] = ()
    nodes: tuple[str, ...] = (node.name,)
    if number != 0 or not reader.is_plain(view):
        tail = reader.tail(output)
        if tail.clamps:
            raise Refusal("is clamped after it pads")
        target, names, nodes = tail.scaling, tail.outputs, (node.name, *tail.nodes)
        source = requantized(reader, view, node.input[0], f"{output}:source", target, node.name)
    fill = target.byte(number)
    offsets = [max(b, 0) for b in begins]
    first = [max(-b, 0) for b in begins]
    extent = [s - f - max(-e, 0) for s, f, e in zip(shape, first, ends, strict=True)]
    ones = (1,) * len(shape)
    piece = Piece(source, tuple(offsets), tuple(extent), tuple(first), ones)
    tensor = names[0] if names else reader.bytes_name(output, target if view.floating else None)
    reader.declare(tensor, reader.network.shapes[output], target)
    reader.operations.append(QMove(node.name, node.op_type, tensor, (piece,), fill=fill, nodes=nodes))
    if names:
        reader.set_bytes(names, tensor)
    else:
        reader.views[output] = view.then(index, tensor)


def concat(reader: Reader, index: int, node: NodeProto) -> None:
    """Parts of other scales are brought to the result's by tables first, as onnxruntime's QLinearConcat does."""
    output = node.output[0]
    shape = reader.network.shapes[output]
    axis = attributes(node)["axis"] % len(shape)
    views = [reader.views.get(name) for name in node.input]
    alike = all(v is not None and reader.is_plain(v) for v in views)
    scalings = {reader.scaling_of(v.tensor) for v in views if v is not None}
    kinds = {v.floating for v in views if v is not None}
    names: tuple[str, ...] = ()
    nodes: tuple[str, ...] = (node.name,)
    if alike and len(scalings) == len(kinds) == 1:
        parts = [v.tensor for v in views if v is not None]
        (target,) = scalings
    else:
        for name, view in zip(node.input, views, strict=True):
            if (view is None or not view.floating) and reader.constant(name) is None:
                raise Refusal("has an input that is not quantized")
        tail = reader.tail(output)
        if tail.clamps:
            raise Refusal("is clamped after it concatenates")
        target, names, nodes = tail.scaling, tail.outputs, (node.name, *tail.nodes)
        parts = [_part(reader, name, f"{output}:{i}", target, node.name) for i, name in enumerate(node.input)]
    pieces, begin = [], 0
    for part in parts:
        extent = reader.tensors[part].shape
        start = tuple(begin if a == axis else 0 for a in range(len(shape)))
        pieces.append(Piece(part, start, extent, (0,) * len(shape), (1,) * len(shape)))
        begin += extent[axis]
    tensor = names[0] if names else reader.bytes_name(output, target if kinds == {True} else None)
    reader.declare(tensor, shape, target)
    reader.operations.append(QMove(node.name, node.op_type, tensor, tuple(pieces), nodes=nodes))
    first = views[0]
    if names:
        reader.set_bytes(names, tensor)
    elif first is not None:
        reader.views[output] = first.then(index, tensor)


def _part(reader: Reader, name: str, output: str, target: Scaling, node: str) -> str:
    view = reader.views.get(name)
    if view is not None:
        return requantized(reader, view, name, output, target, node)
    value = reader.constant(name)
    assert value is not None  # the caller has looked
    kind = np.int8 if target.signed else np.uint8
    low, high = target.limits
    units = np.rint(value.astype(np.float32) / np.float32(target.scale)) + target.zero
    reader.constants[output] = np.clip(units, low, high).astype(kind)
    return reader.declare(output, value.shape, target)
