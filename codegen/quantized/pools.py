"""Pools over windows and over whole maps."""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from codegen.quantized.graph import Pool, QPool, QReshape, average_multiplier
from codegen.quantized.onnx_network import attributes
from codegen.quantized.reader import Reader
from codegen.quantized.views import Refusal, View

_MONOTONE = frozenset({"Relu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "Softplus", "Softsign", "Identity", "Dropout"})

Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def max_pool(reader: Reader, index: int, node: NodeProto) -> None:
    """A maximum commutes with every function that does not fall, so it needs no QuantizeLinear behind it."""
    view = _rising(reader, node)
    if len([name for name in node.output if name]) > 1:
        raise Refusal("gives indices beside its values")
    x = reader.tensors[view.tensor]
    _maximum(reader, index, node, view, _window(node, x.shape[2:], reader.network.shapes[node.output[0]][2:]))


def global_max_pool(reader: Reader, index: int, node: NodeProto) -> None:
    view = _rising(reader, node)
    _maximum(reader, index, node, view, _whole(reader.tensors[view.tensor].shape[2:]))


def average_pool(reader: Reader, index: int, node: NodeProto) -> None:
    x = reader.plain(node.input[0])
    target = reader.network.shapes[node.output[0]][2:]
    padded = bool(attributes(node).get("count_include_pad", 0))
    _average(reader, node, _window(node, x.shape[2:], target), padded)


def global_average_pool(reader: Reader, index: int, node: NodeProto) -> None:
    x = reader.plain(node.input[0])
    _average(reader, node, _whole(x.shape[2:]), False)


def reduce(reader: Reader, index: int, node: NodeProto) -> None:
    """ReduceMean and ReduceMax over all spatial axes of a map."""
    mean = node.op_type == "ReduceMean"
    view = None if mean else _rising(reader, node)
    x = reader.plain(node.input[0]) if view is None else reader.tensors[view.tensor]
    given = attributes(node)
    axes = given.get("axes")
    if len(node.input) > 1 and node.input[1]:
        value = reader.constant(node.input[1])
        if value is None:
            raise Refusal("has axes that are computed")
        axes = value.tolist()
    rank = len(x.shape)
    if rank < 3 or sorted(a % rank for a in axes or range(rank)) != list(range(2, rank)):
        raise Refusal(f"reduces the axes {axes} of {rank}, which are not the spatial ones")
    window = _whole(x.shape[2:])
    if view is None:
        _average(reader, node, window, False, bool(given.get("keepdims", 1)))
    elif given.get("keepdims", 1):
        _maximum(reader, index, node, view, window)
    else:
        raise Refusal("drops the axes that it takes the maximum over")


def _rising(reader: Reader, node: NodeProto) -> View:
    view = reader.views.get(node.input[0])
    if view is None:
        raise Refusal("has an input that is not quantized")
    if any(f.op_type not in _MONOTONE for f in reader.functions(view)):
        raise Refusal("takes the maximum of a function that may fall, without quantizing it")
    return view


def _whole(spatial: tuple[int, ...]) -> Window:
    n = len(spatial)
    return spatial, (1,) * n, (0,) * 2 * n, (1,) * n


def _window(node: NodeProto, source: tuple[int, ...], target: tuple[int, ...]) -> Window:
    """Kernel, strides, pads and dilations. What ceil_mode lets stick out at the end becomes padding."""
    given = attributes(node)
    kernel = tuple(given["kernel_shape"])
    n = len(kernel)
    strides = tuple(given.get("strides", (1,) * n))
    dilations = tuple(given.get("dilations", (1,) * n))
    pads = list(given.get("pads", (0,) * 2 * n))
    auto = given.get("auto_pad", "NOTSET")
    for i in range(n):
        reach = dilations[i] * (kernel[i] - 1) + 1
        needed = (target[i] - 1) * strides[i] + reach - source[i]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max(needed, 0)
            pads[i] = total // 2 if auto == "SAME_UPPER" else total - total // 2
            pads[i + n] = total - pads[i]
        elif auto == "VALID":
            pads[i] = pads[i + n] = 0
        pads[i + n] = max(pads[i + n], needed - pads[i])
    return kernel, strides, tuple(pads), dilations


def _maximum(reader: Reader, index: int, node: NodeProto, view: View, window: Window) -> None:
    output = node.output[0]
    tensor = reader.moved(output, view)
    kernel, strides, pads, dilations = window
    reader.operations.append(
        QPool(node.name, node.op_type, Pool.MAX, view.tensor, tensor, kernel, strides, pads, dilations,
              nodes=(node.name,))
    )  # fmt: skip
    reader.views[output] = view.then(index, tensor)


def _average(reader: Reader, node: NodeProto, window: Window, padded: bool, keep: bool = True) -> None:
    x, tail = reader.plain(node.input[0]), reader.tail(node.output[0])
    kernel, strides, pads, dilations = window
    shape = reader.network.shapes[node.output[0]]
    output = tail.outputs[0]
    full = shape if keep else (*shape, *(1,) * len(kernel))
    name = output if keep else f"{output}:pooled"
    y = reader.tensors[reader.declare(name, full, tail.scaling)]
    ratio = float(average_multiplier(x, y, prod(kernel)))
    pool = QPool(node.name, node.op_type, Pool.AVERAGE, x.name, name, kernel, strides, pads, dilations, ratio, padded,
                 (node.name, *tail.nodes))  # fmt: skip
    if keep:
        reader.finish(pool, tail, shape, clamped=False)
        return
    reader.operations.append(pool)
    reader.finish(QReshape(f"{node.name}/squeeze", "Squeeze", name, output, (node.name,)), tail, shape, clamped=False)
