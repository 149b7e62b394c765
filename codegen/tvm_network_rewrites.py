"""Operators that TVM's importer lacks, written with those that it has.

Operators that ONNX itself defines by a function body (Swish, Celu, ...) and functions of the model are put in place;
integer convolutions and products are computed in floats between the (de)quantizations that they stand for; recurrent
layers of a fixed, short sequence are unrolled. The definitions are those of ONNX's operator reference. What remains is
the importer's to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

_LONGEST = 64
"""Steps up to which a recurrent layer is unrolled: each is half a dozen functions to compile and to call."""

_FUNCTIONS = "rankc.functions"


def rewritten(model: onnx.ModelProto, known: Collection[str]) -> onnx.ModelProto:
    """``model`` without the operators that are not among the importer's ``known`` ones, as far as they can be written.

    Shapes of recurrent layers' inputs must be fixed; constants must be initializers.
    """
    from onnx import inliner, shape_inference

    lacking = {node.op_type for node in model.graph.node if node.op_type not in known}
    if not lacking and not model.functions:
        return model
    model = _with_bodies(model, lacking)
    if model.functions:
        model = inliner.inline_local_functions(model, convert_version=True)
    if any(node.op_type in _WRITERS and node.op_type not in known for node in model.graph.node):
        model = shape_inference.infer_shapes(model, data_prop=True)
        graph = _Graph.of(model)
        nodes = list(model.graph.node)
        del model.graph.node[:]
        for node in nodes:
            graph.prefix = node.name or node.output[0]
            write = None if node.op_type in known else _WRITERS.get(node.op_type)
            if write is None or not write(graph, node):
                graph.model.graph.node.append(node)
        # types of what was between the old nodes hold for the new ones too, or are nobody's any more
    return model


def _with_bodies(model: onnx.ModelProto, lacking: Collection[str]) -> onnx.ModelProto:
    """Nodes of operators that have a body become calls of functions of the model, one for each node."""
    import onnx

    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    model = onnx.shape_inference.infer_shapes(model)
    types = {value.name: value.type for value in (*model.graph.input, *model.graph.value_info)}
    types |= {
        tensor.name: onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
    }
    written = False
    for index, node in enumerate(model.graph.node):
        if node.op_type not in lacking or node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            continue
        body = _body(onnx.defs.get_schema(node.op_type, opset), node, types, opset)
        if body is not None:
            body.domain, body.name = _FUNCTIONS, f"{node.op_type}_{index}"
            model.functions.append(body)
            node.domain, node.op_type = body.domain, body.name
            written = True
    if written:
        model.opset_import.append(onnx.helper.make_opsetid(_FUNCTIONS, 1))
    return model


def _body(schema: Any, node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], opset: int) -> Any:
    """What the operator's definition says that the node computes; None where it says so in words alone."""
    import onnx

    if schema.has_function:
        body = onnx.FunctionProto()
        body.CopyFrom(schema.function_body)
    elif schema.has_context_dependent_function and all(name in types for name in node.input):
        given = [types[name].SerializeToString() for name in node.input]
        body = onnx.FunctionProto.FromString(schema.get_context_dependent_function(node.SerializeToString(), given))
    else:
        return None
    needed = max((entry.version for entry in body.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    return body if needed <= opset else None


@dataclass
class _Graph:
    """The model in the making; ``prefix``: the name of the node that is being written, which its parts carry."""

    model: onnx.ModelProto
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    prefix: str = ""
    count: int = 0

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Graph:
        from onnx import numpy_helper

        graph = cls(model)
        for value in (*model.graph.input, *model.graph.value_info):
            dims = value.type.tensor_type.shape.dim
            if all(dim.HasField("dim_value") for dim in dims):
                graph.shapes[value.name] = tuple(dim.dim_value for dim in dims)
        for tensor in model.graph.initializer:
            graph.constants[tensor.name] = numpy_helper.to_array(tensor)
        return graph

    def node(self, op: str, inputs: list[str], *, out: str = "", **attributes: Any) -> str:
        """Adds a node of one output and returns the output's name."""
        return self.nodes(op, inputs, [out], **attributes)[0]

    def nodes(self, op: str, inputs: list[str], outs: list[str], **attributes: Any) -> list[str]:
        from onnx import helper

        self.count += 1
        named = [out or f"{self.prefix}/{op}_{self.count}.{i}" for i, out in enumerate(outs)]
        label = f"{self.prefix}/{op}_{self.count}"
        self.model.graph.node.append(helper.make_node(op, inputs, named, label, **attributes))
        return named

    def constant(self, values: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.count += 1
        name = f"{self.prefix}/constant_{self.count}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(values, order="C"), name))
        return name


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _input(node: onnx.NodeProto, index: int) -> str:
    """The name of an optional input, "" where it is left out."""
    return node.input[index] if len(node.input) > index else ""


def _qlinear_conv(graph: _Graph, node: onnx.NodeProto) -> bool:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.input[:8]
    inputs = [graph.node("DequantizeLinear", [x, x_scale, x_zero])]
    # per output channel where the scales are several
    inputs.append(graph.node("DequantizeLinear", [w, w_scale, w_zero], axis=0))
    if _input(node, 8):
        scales = graph.constants.get(x_scale), graph.constants.get(w_scale), graph.constants.get(node.input[8])
        if any(values is None for values in scales):
            return False
        one, other, bias = (np.asarray(values, np.float32) for values in scales)
        inputs.append(graph.constant(bias * one * other))
    made = graph.node("Conv", inputs, **_attributes(node))
    graph.node("QuantizeLinear", [made, y_scale, y_zero], out=node.output[0])
    return True


def _qlinear_matmul(graph: _Graph, node: onnx.NodeProto) -> bool:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.input[:8]
    if any(graph.constants.get(name, np.zeros(2)).size != 1 for name in (a_scale, b_scale)):
        return False
    left, right = graph.node("DequantizeLinear", [a, a_scale, a_zero]), graph.node(
        "DequantizeLinear", [b, b_scale, b_zero]
    )  # fmt: skip
    graph.node("QuantizeLinear", [graph.node("MatMul", [left, right]), y_scale, y_zero], out=node.output[0])
    return True


def _lp_normalization(graph: _Graph, node: onnx.NodeProto) -> bool:
    attributes = _attributes(node)
    axis = graph.constant(np.array([attributes.get("axis", -1)], np.int64))
    # ReduceL1 and ReduceL2 take their axes as an attribute until opset 18
    x = node.input[0]
    if attributes.get("p", 2) == 1:
        norm = graph.node("ReduceSum", [graph.node("Abs", [x]), axis], keepdims=1)
    else:
        norm = graph.node("Sqrt", [graph.node("ReduceSum", [graph.node("Mul", [x, x]), axis], keepdims=1)])
    graph.node("Div", [x, norm], out=node.output[0])
    return True


def _recurrent(graph: _Graph, node: onnx.NodeProto) -> bool:
    """LSTM or GRU. Other activations, peepholes, and sequences of several lengths are left alone."""
    op, attributes = node.op_type, _attributes(node)
    gates = {"LSTM": 4, "GRU": 3}[op]
    x, w, r = node.input[:3]
    usual = {b"Sigmoid", b"Tanh"} if "activations" in attributes else set()
    pattern = [b"Sigmoid", b"Tanh", b"Tanh"][: 3 if op == "LSTM" else 2]
    given = attributes.get("activations", pattern)
    if usual and (set(given) != usual or list(given)[: len(pattern)] * (len(given) // len(pattern)) != list(given)):
        return False
    if any(name in attributes for name in ("clip", "input_forget")) or attributes.get("layout", 0) != 0:
        return False
    states = [_input(node, 5)] + ([_input(node, 6)] if op == "LSTM" else [])
    if _input(node, 4) or _input(node, 7) or w not in graph.constants or r not in graph.constants:
        return False
    bias_name = _input(node, 3)
    if x not in graph.shapes or (bias_name and bias_name not in graph.constants):
        return False
    steps, batch, _ = graph.shapes[x]
    if not 0 < steps <= _LONGEST:
        return False
    weights, recurrences = graph.constants[w], graph.constants[r]
    hidden = int(recurrences.shape[2])
    bias = graph.constants[bias_name] if bias_name else np.zeros((len(weights), 2 * gates * hidden), weights.dtype)
    direction = attributes.get("direction", b"forward")
    orders = {b"forward": [1], b"reverse": [-1], b"bidirectional": [1, -1]}[direction]
    sequences, finals = [], []
    for index, order in enumerate(orders):
        start = []
        for state in states:
            if state:
                one = graph.constant(np.array(index, np.int64))
                start.append(graph.node("Gather", [state, one], axis=0))
            else:
                start.append(graph.constant(np.zeros((batch, hidden), weights.dtype)))
        layer = _Layer(graph, hidden, recurrences[index], *np.split(bias[index], 2))
        projected = graph.node("MatMul", [x, graph.constant(weights[index].T)])
        parts = graph.nodes("Split", [projected], [""] * steps, axis=0) if steps > 1 else [projected]
        first = graph.constant(np.array([0], np.int64))
        outs = []
        for part in parts[::order]:
            start = layer.step(op, graph.node("Squeeze", [part, first]), start, attributes)
            outs.append(graph.node("Unsqueeze", [start[0], first]))
        sequences.append(graph.node("Concat", outs[::order], axis=0))  # (steps, batch, hidden)
        finals.append([graph.node("Unsqueeze", [value, first]) for value in start])
    if _output(node, 0):
        second = graph.constant(np.array([1], np.int64))
        directions = [graph.node("Unsqueeze", [sequence, second]) for sequence in sequences]
        graph.node("Concat", directions, out=node.output[0], axis=1)
    for position, values in enumerate(zip(*finals, strict=True), start=1):
        if _output(node, position):
            graph.node("Concat", list(values), out=node.output[position], axis=0)
    return True


def _output(node: onnx.NodeProto, index: int) -> str:
    return node.output[index] if len(node.output) > index else ""


@dataclass
class _Layer:
    """One direction of a recurrent layer: (gates * hidden, hidden) weights, and biases of both products."""

    graph: _Graph
    hidden: int
    recurrence: NDArray[Any]
    bias: NDArray[Any]
    recurrent_bias: NDArray[Any]

    def __post_init__(self) -> None:
        self.names: dict[str, str] = {}

    def step(self, op: str, x: str, state: list[str], attributes: dict[str, Any]) -> list[str]:
        """The state behind a step, of which ``x``, (batch, gates * hidden), is the input's share."""
        return self._lstm(x, *state) if op == "LSTM" else self._gru(x, state[0], attributes)

    def _held(self, key: str, values: Callable[[], NDArray[Any]]) -> str:
        if key not in self.names:
            self.names[key] = self.graph.constant(values())
        return self.names[key]

    def _lstm(self, x: str, h: str, c: str) -> list[str]:
        node = self.graph.node
        product = node("MatMul", [h, self._held("r", lambda: self.recurrence.T)])
        total = node("Add", [node("Add", [x, product]), self._held("b", lambda: self.bias + self.recurrent_bias)])
        i, o, f, g = self.graph.nodes("Split", [total], [""] * 4, axis=1)
        kept = node("Mul", [node("Sigmoid", [f]), c])
        cell = node("Add", [kept, node("Mul", [node("Sigmoid", [i]), node("Tanh", [g])])])
        return [node("Mul", [node("Sigmoid", [o]), node("Tanh", [cell])]), cell]

    def _gru(self, x: str, h: str, attributes: dict[str, Any]) -> list[str]:
        node, hidden = self.graph.node, self.hidden
        biased = node("Add", [x, self._held("b", lambda: self.bias)])
        zx, rx, nx = self.graph.nodes("Split", [biased], [""] * 3, axis=1)

        def recurrent(gate: int, value: str) -> str:
            part = slice(gate * hidden, (gate + 1) * hidden)
            product = node("MatMul", [value, self._held(f"r{gate}", lambda: self.recurrence[part].T)])
            return node("Add", [product, self._held(f"b{gate}", lambda: self.recurrent_bias[part])])

        z = node("Sigmoid", [node("Add", [zx, recurrent(0, h)])])
        r = node("Sigmoid", [node("Add", [rx, recurrent(1, h)])])
        if attributes.get("linear_before_reset", 0):
            inner = node("Mul", [r, recurrent(2, h)])
        else:
            inner = recurrent(2, node("Mul", [r, h]))
        n = node("Tanh", [node("Add", [nx, inner])])
        return [node("Add", [n, node("Mul", [z, node("Sub", [h, n])])])]


_WRITERS: dict[str, Callable[[_Graph, Any], bool]] = {
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "LpNormalization": _lp_normalization,
    "LSTM": _recurrent,
    "GRU": _recurrent,
}
