"""Functions of one byte as tables, sums and products of two tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from codegen.quantized.graph import QProduct, QSum, QTable, QTensor
from codegen.quantized.onnx_network import attributes, byte_type, integer_options, run
from codegen.quantized.reader import Reader
from codegen.quantized.views import Refusal, Scaling, View

Array = NDArray[Any]

UNARY = frozenset(
    {
        "Abs", "Acos", "Asin", "Atan", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "FastGelu", "Floor",
        "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "PRelu", "QuickGelu", "Reciprocal",
        "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
        "ThresholdedRelu",
    }
)  # fmt: skip
BINARY = frozenset({"Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"})
SAME = frozenset({"Identity", "Dropout"})
FUNCTIONS = UNARY | BINARY


def function(reader: Reader, index: int, node: NodeProto) -> None:
    """A node that computes each element from the one in its place: it becomes part of a view.

    All inputs are scalars or views of one and the same byte tensor. Raises Refusal.
    """
    views: list[View] = []
    for name in node.input:
        view = reader.views.get(name)
        if view is not None:
            views.append(view)
            continue
        value = reader.constant(name) if name else np.zeros(())
        if value is None:
            raise Refusal("has an input that is not quantized")
        if value.size != 1:
            raise Refusal(f"has a constant of shape {value.shape}, not one value for all elements")
    if not views or any(view.tensor != views[0].tensor for view in views):
        raise Refusal("is a function of more than one tensor")
    if any(not view.floating for view in views) and node.op_type != "Cast":
        raise Refusal("calculates with integers")
    if node.op_type == "Cast" and attributes(node)["to"] != TensorProto.FLOAT:
        raise Refusal("converts to another type")
    if reader.network.shapes[node.output[0]] != reader.tensors[views[0].tensor].shape:
        raise Refusal("changes the shape")
    nodes = dict.fromkeys(i for view in views for i in view.nodes)
    merged = View(views[0].tensor, tuple(sorted(nodes)), True)
    reader.views[node.output[0]] = merged.then(index)


def same(reader: Reader, index: int, node: NodeProto) -> None:
    view = reader.views.get(node.input[0])
    if view is None or len([name for name in node.output if name]) > 1:
        raise Refusal("has an input that is not quantized")
    reader.views[node.output[0]] = view.then(index)


def quantize(reader: Reader, index: int, node: NodeProto) -> None:
    """QuantizeLinear of a view: the same bytes, or a table."""
    view = reader.views.get(node.input[0])
    output = node.output[0]
    scaling = reader.scaling(node)
    if view is None:
        # The host's floats; whoever makes them is already refused.
        reader.declare(output, reader.network.shapes[output], scaling)
        reader.wanted[output] = node.input[0]
        reader.set_bytes((output,), output)
        return
    if not view.floating:
        raise Refusal("quantizes integers")
    reader.set_bytes((output,), requantized(reader, view, node.input[0], output, scaling, node.name))


def requantized(reader: Reader, view: View, name: str, output: str, scaling: Scaling, node_name: str) -> str:
    """The byte tensor of the float tensor ``name`` under ``scaling``: the view's own, or ``output`` by a table."""
    if reader.is_plain(view) and reader.scaling_of(view.tensor) == scaling:
        return view.tensor
    functions = reader.functions(view)
    table = _table(reader, view, name, scaling)
    nodes = (*(f.name for f in functions), node_name)
    op = "+".join(f.op_type for f in functions) or "QuantizeLinear"
    label = functions[-1].name if functions else node_name
    reader.declare(output, reader.tensors[view.tensor].shape, scaling)
    reader.operations.append(QTable(label, op, view.tensor, output, table, nodes))
    return output


def dequantize(reader: Reader, index: int, node: NodeProto) -> None:
    view = reader.views.get(node.input[0])
    if view is None or view.floating:
        if reader.quantized_constant(node.output[0]) is not None:
            return
        raise Refusal("has an input that is no quantized tensor")
    scaling = reader.scaling(node)
    tensor = view.tensor
    if reader.scaling_of(tensor) != scaling:
        # The same bytes under another scale: a tensor of its own.
        tensor = reader.declare(reader.bytes_name(node.output[0]), reader.tensors[tensor].shape, scaling)
        table = bytes(range(256))
        reader.operations.append(QTable(node.name, "DequantizeLinear", view.tensor, tensor, table, (node.name,)))
    reader.views[node.output[0]] = View(tensor, (index,), True)


def _table(reader: Reader, view: View, name: str, scaling: Scaling) -> bytes:
    """What onnxruntime makes of all 256 bytes, by the view's own nodes up to ``name``, quantized."""
    network, source = reader.network, reader.scaling_of(view.tensor)
    nodes: list[NodeProto] = []
    constants: dict[str, Array] = {}

    def parameters(tag: str, of: Scaling) -> list[str]:
        constants[f"{tag}/scale"] = np.array(of.scale, np.float32)
        constants[f"{tag}/zero"] = np.array(of.zero, np.int8 if of.signed else np.uint8)
        return [f"{tag}/scale", f"{tag}/zero"]

    given = parameters("from", source)
    made: set[str] = set()
    for i in view.nodes:
        node = network.nodes[i]
        made.update(node.output)
        if node.op_type == "DequantizeLinear":
            nodes.append(helper.make_node("DequantizeLinear", ["bytes", *given], list(node.output), name=node.name))
        elif node.op_type in FUNCTIONS:
            copy = NodeProto()
            copy.CopyFrom(node)
            for k, read in enumerate(copy.input):
                if read in reader.views and read not in made:
                    copy.input[k] = "bytes"  # a Cast of the network's own bytes
                elif read in network.constants:
                    constants[read] = network.constants[read]
                elif read and read not in made:
                    nodes.append(network.nodes[network.writer[read]])
                    made.add(read)
                    constants.update({n: network.constants[n] for n in nodes[-1].input if n})
            nodes.append(copy)
        else:
            nodes.extend(helper.make_node("Identity", [node.input[0]], [o]) for o in node.output if o)
    nodes.append(helper.make_node("QuantizeLinear", [name, *parameters("to", scaling)], ["table"]))
    kinds = [TensorProto.INT8 if s.signed else TensorProto.UINT8 for s in (source, scaling)]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("bytes", kinds[0], [256])],
        [helper.make_tensor_value_info("table", kinds[1], None)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    every = np.arange(256, dtype=np.uint8).view(np.int8 if source.signed else np.uint8)
    options = integer_options(source.signed)
    (found,) = run(network.model(graph), options, {"bytes": every}, ["table"])
    return found.reshape(-1).tobytes()


def add(reader: Reader, index: int, node: NodeProto) -> None:
    """Add, Sub and Sum of two tensors; of one tensor, or of a tensor and a scalar, a function."""
    if _is_function(reader, index, node):
        return
    a, b = _operands(reader, node)
    tail = reader.tail(node.output[0])
    shape = reader.network.shapes[node.output[0]]
    y = tail.scaling
    sign = np.float32(-1 if node.op_type == "Sub" else 1)
    a_ratio = np.float32(a.scale) / np.float32(y.scale)
    b_ratio = sign * np.float32(b.scale) / np.float32(y.scale)
    known = np.float64(a_ratio) * a.zero_point + np.float64(np.float32(b_ratio * np.float32(b.zero_point)))
    offset = np.float32(np.float32(y.zero) - np.float32(known))
    if _is_spread(a.shape, b.shape, shape):
        # onnxruntime multiplies the operand that is one element per row first.
        a, b, a_ratio, b_ratio = b, a, b_ratio, a_ratio
    operation = QSum(
        node.name, node.op_type, a.name, b.name, tail.outputs[0], float(a_ratio), float(b_ratio), float(offset),
        tail.low, tail.high, (node.name, *tail.nodes),
    )  # fmt: skip
    reader.finish(operation, tail, shape, clamped=True)


def multiply(reader: Reader, index: int, node: NodeProto) -> None:
    if _is_function(reader, index, node):
        return
    a, b = _operands(reader, node)
    tail = reader.tail(node.output[0])
    ratio = np.float32(a.scale) * np.float32(b.scale) / np.float32(tail.scaling.scale)
    operation = QProduct(
        node.name, node.op_type, a.name, b.name, tail.outputs[0], float(ratio), (node.name, *tail.nodes)
    )
    reader.finish(operation, tail, reader.network.shapes[node.output[0]], clamped=False)


def _is_function(reader: Reader, index: int, node: NodeProto) -> bool:
    try:
        function(reader, index, node)
    except Refusal:
        return False
    return True


def _operands(reader: Reader, node: NodeProto) -> tuple[QTensor, QTensor]:
    if len(node.input) != 2:
        raise Refusal(f"has {len(node.input)} operands, not two")
    a, b = (_operand(reader, name) for name in node.input)
    return a, b


def _operand(reader: Reader, name: str) -> QTensor:
    """A byte tensor, or a constant that becomes one."""
    if name in reader.views:
        return reader.plain(name, "operand")
    found = reader.quantized_constant(name)
    if found is None:
        floats = name in reader.network.constants
        raise Refusal("has a constant operand in floats" if floats else "has an operand that is not quantized")
    kind = {np.dtype(np.int8): TensorProto.INT8, np.dtype(np.uint8): TensorProto.UINT8}.get(found.values.dtype)
    signed = None if kind is None else byte_type(kind)
    if found.axis is not None or signed is None:
        raise Refusal("has a constant operand that is not quantized like an activation")
    tensor = reader.bytes_name(name)
    reader.constants[tensor] = found.values
    reader.declare(tensor, found.values.shape, Scaling(float(found.scale[0]), int(found.zero[0]), signed))
    return reader.tensors[tensor]


def _is_spread(a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """True if the innermost axis that has more than one element in the result has one in ``a`` and not in ``b``."""
    for back in range(1, len(out) + 1):
        sizes = [shape[-back] if back <= len(shape) else 1 for shape in (a, b)]
        if out[-back] > 1:
            return sizes[0] == 1 < sizes[1]
    return False
