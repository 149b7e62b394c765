"""What only moves bytes: Slice, Split, Transpose, Gather, Expand, Resize to the nearest, other shapes of the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from codegen.quantized.graph import Piece, QMove, QReshape
from codegen.quantized.onnx_network import attributes
from codegen.quantized.reader import Reader
from codegen.quantized.views import Refusal, View

Array = NDArray[Any]

Run = tuple[int, int, int, int, int]
"""Of one axis: begin, length, source begin, source step, step."""

_PIECES = 64
"""A move in more pieces is left to the host."""


def reshape(reader: Reader, index: int, node: NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the order of elements stays."""
    view = view_of(reader, node.input[0])
    output = node.output[0]
    if reader.network.shapes[output] == reader.tensors[view.tensor].shape:
        reader.views[output] = view.then(index)
        return
    tensor = reader.moved(output, view)
    reader.operations.append(QReshape(node.name, node.op_type, view.tensor, tensor, (node.name,)))
    reader.views[output] = view.then(index, tensor)


def transpose(reader: Reader, index: int, node: NodeProto) -> None:
    view = view_of(reader, node.input[0])
    rank = len(reader.tensors[view.tensor].shape)
    permutation = tuple(attributes(node).get("perm", range(rank)[::-1]))
    _permute(reader, index, node, view, permutation)


def depth_to_space(reader: Reader, index: int, node: NodeProto) -> None:
    """DepthToSpace and SpaceToDepth: another shape, a permutation, another shape."""
    view, given = view_of(reader, node.input[0]), attributes(node)
    size = given["blocksize"]
    n, c, h, w = reader.tensors[view.tensor].shape
    inner: tuple[int, ...]
    if node.op_type == "SpaceToDepth":
        inner, permutation = (n, c, h // size, size, w // size, size), (0, 3, 5, 1, 2, 4)
    elif given.get("mode", "DCR") == "DCR":
        inner, permutation = (n, size, size, c // size**2, h, w), (0, 3, 4, 1, 5, 2)
    else:
        inner, permutation = (n, c // size**2, size, size, h, w), (0, 1, 4, 2, 5, 3)
    output = node.output[0]
    split = _inner(reader, f"{output}:split", view, inner)
    moved = _inner(reader, f"{output}:moved", view, tuple(inner[p] for p in permutation))
    tensor = reader.moved(output, view)
    shape = reader.tensors[moved].shape
    reader.operations += [
        QReshape(f"{node.name}/split", "Reshape", view.tensor, split, (node.name,)),
        QMove(node.name, node.op_type, moved, (_box(split, shape),), permutation, nodes=(node.name,)),
        QReshape(f"{node.name}/join", "Reshape", moved, tensor, (node.name,)),
    ]
    reader.views[output] = view.then(index, tensor)


def crop(reader: Reader, index: int, node: NodeProto) -> None:
    """Slice."""
    view = view_of(reader, node.input[0])
    shape = reader.tensors[view.tensor].shape
    given = attributes(node)
    names = ["data", "starts", "ends", "axes", "steps"]
    values: dict[str, Any] = {name: given.get(name) for name in names[1:]}
    for name, read in zip(names[1:], node.input[1:], strict=False):
        values[name] = integers(reader, read, name) if read else None
    starts, ends = values["starts"], values["ends"]
    axes = values["axes"] or range(len(starts))
    steps = values["steps"] or [1] * len(starts)
    maps = [np.arange(size) for size in shape]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        maps[axis] = maps[axis][slice(start, None if step < 0 and end < -shape[axis] else end, step)]
    gathered(reader, index, node, view, node.output[0], maps)


def split(reader: Reader, index: int, node: NodeProto) -> None:
    view = view_of(reader, node.input[0])
    shape = reader.tensors[view.tensor].shape
    axis = attributes(node).get("axis", 0) % len(shape)
    begin = 0
    for output in node.output:
        size = reader.network.shapes[output][axis]
        maps = [np.arange(extent) for extent in shape]
        maps[axis] = np.arange(begin, begin + size)
        begin += size
        gathered(reader, index, node, view, output, maps)


def gather(reader: Reader, index: int, node: NodeProto) -> None:
    """Gather by constant indices along one axis; a single index drops the axis."""
    view = view_of(reader, node.input[0])
    shape = reader.tensors[view.tensor].shape
    axis = attributes(node).get("axis", 0) % len(shape)
    value = reader.constant(node.input[1])
    if value is None or value.ndim > 1:
        raise Refusal("has indices that are computed, or more than a list of them")
    maps = [np.arange(size) for size in shape]
    maps[axis] = np.where(value < 0, value + shape[axis], value).reshape(-1)
    if value.ndim == 1:
        gathered(reader, index, node, view, node.output[0], maps)
        return
    pieces = _pieces(view.tensor, maps)
    inner = _inner(reader, f"{node.output[0]}:gathered", view, tuple(len(m) for m in maps))
    tensor = reader.moved(node.output[0], view)
    reader.operations += [
        QMove(node.name, node.op_type, inner, pieces, nodes=(node.name,)),
        QReshape(f"{node.name}/squeeze", "Squeeze", inner, tensor, (node.name,)),
    ]
    reader.views[node.output[0]] = view.then(index, tensor)


def expand(reader: Reader, index: int, node: NodeProto) -> None:
    """Expand and Tile, as long as the number of axes stays."""
    view = view_of(reader, node.input[0])
    shape, target = reader.tensors[view.tensor].shape, reader.network.shapes[node.output[0]]
    if len(shape) != len(target):
        raise Refusal("adds axes")
    gathered(reader, index, node, view, node.output[0], [np.arange(t) % s for s, t in zip(shape, target, strict=True)])


def resize(reader: Reader, index: int, node: NodeProto) -> None:
    """Resize and Upsample to the nearest element: which one, onnxruntime says itself, axis by axis."""
    view, given = view_of(reader, node.input[0]), attributes(node)
    if given.get("mode", "nearest") != "nearest":
        raise Refusal(f"interpolates ({given['mode']})")
    if node.op_type == "Resize" and given.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Refusal("crops while it resizes")
    shape = reader.tensors[view.tensor].shape
    maps = []
    for axis, size in enumerate(shape):
        line = np.arange(size, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        feed = np.broadcast_to(line, shape)
        (found,) = reader.network.evaluate([node], [node.output[0]], {node.input[0]: np.ascontiguousarray(feed)})
        maps.append(np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1)[:, 0].astype(np.int64))
    gathered(reader, index, node, view, node.output[0], maps)


def view_of(reader: Reader, name: str) -> View:
    view = reader.views.get(name)
    if view is None:
        raise Refusal("has an input that is not quantized")
    return view


def _inner(reader: Reader, name: str, view: View, shape: tuple[int, ...]) -> str:
    """A byte tensor that the ONNX network has not got, scaled as ``view``'s."""
    return reader.declare(name, shape, reader.scaling_of(view.tensor))


def integers(reader: Reader, name: str, what: str) -> list[int]:
    value = reader.constant(name)
    if value is None:
        raise Refusal(f"has {what} that are computed")
    return [int(v) for v in value.reshape(-1)]


def _permute(reader: Reader, index: int, node: NodeProto, view: View, permutation: tuple[int, ...]) -> None:
    tensor = reader.moved(node.output[0], view)
    piece = _box(view.tensor, reader.tensors[tensor].shape)
    reader.operations.append(QMove(node.name, node.op_type, tensor, (piece,), permutation, nodes=(node.name,)))
    reader.views[node.output[0]] = view.then(index, tensor)


def _box(tensor: str, shape: tuple[int, ...]) -> Piece:
    zeros, ones = (0,) * len(shape), (1,) * len(shape)
    return Piece(tensor, zeros, shape, zeros, ones)


def gathered(reader: Reader, index: int, node: NodeProto, view: View, output: str, maps: Sequence[Array]) -> None:
    """``output[i, j, ...] = input[maps[0][i], maps[1][j], ...]``; nothing to do where that is the input itself."""
    shape = reader.tensors[view.tensor].shape
    if all(len(m) == s and (m == np.arange(s)).all() for m, s in zip(maps, shape, strict=True)):
        reader.views[output] = view.then(index)
        return
    pieces = _pieces(view.tensor, maps)
    tensor = reader.moved(output, view)
    reader.operations.append(QMove(node.name, node.op_type, tensor, pieces, nodes=(node.name,)))
    reader.views[output] = view.then(index, tensor)


def _pieces(tensor: str, maps: Sequence[Array]) -> tuple[Piece, ...]:
    runs = [_runs(m) for m in maps]
    if np.prod([len(r) for r in runs]) > _PIECES:
        raise Refusal("moves bytes in no regular pattern")
    pieces = []
    for box in product(*runs):
        begin, shape, source, source_step, step = (tuple(column) for column in zip(*box, strict=True))
        piece = Piece(tensor, begin, shape, source, source_step)
        pieces.append(piece if all(s == 1 for s in step) else replace(piece, step=step))
    return tuple(pieces)


def _runs(positions: Array) -> list[Run]:
    """An axis' map as arithmetic sequences: interleaved ones where all have one step, else one after another."""
    size = len(positions)
    if size < 2:
        return [(0, size, int(positions[0]) if size else 0, 1, 1)]
    for stride in range(1, 17):
        if size % stride or size // stride < 2:
            continue
        columns = positions.reshape(-1, stride)
        steps = np.diff(columns, axis=0)
        if (steps == steps[0]).all() and (stride == 1 or (steps == steps[0, 0]).all()):
            return [(k, size // stride, int(columns[0, k]), int(steps[0, k]), stride) for k in range(stride)]
    runs: list[Run] = []
    start = 0
    while start < size:
        end = start + 1
        step = int(positions[end] - positions[start]) if end < size else 1
        while end < size and positions[end] - positions[end - 1] == step:
            end += 1
        if end - start == 1:
            step = 1
        runs.append((start, end - start, int(positions[start]), step, 1))
        start = end
    return runs
