"""The state of reading a QDQ network: which tensors are bytes, which operations there are, what the host must do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from codegen.quantized.graph import HostTensor, QConv, QOperation, QPool, QProduct, QReshape, QSum, QTable, QTensor
from codegen.quantized.onnx_network import Network, attributes, byte_type
from codegen.quantized.views import QuantizedConstant, Refusal, Scaling, Tail, View

Array = NDArray[Any]

CLAMPS = ("Relu", "Clip")
NOTHING = ("Identity", "Dropout")


class Reader:
    """What handlers of operators read and write.

    ``views``: tensors of the ONNX network that are known as bytes; a tensor that is neither there nor a constant is
    the host's. ``wanted``: byte tensors that the host computes, with the name of the float tensor and of its nodes.
    ``refused``: index of a node -> why it is left to the host.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.tensors: dict[str, QTensor] = {}
        self.constants: dict[str, Array] = {}
        self.host_tensors: dict[str, HostTensor] = {}
        self.operations: list[QOperation] = []
        self.views: dict[str, View] = {}
        self.wanted: dict[str, str] = {}
        self.refused: dict[int, str] = {}

    def scaling(self, node: NodeProto) -> Scaling:
        """The parameters of a QuantizeLinear or DequantizeLinear of activations. Raises Refusal."""
        constants = self.network.constants
        if node.input[1] not in constants or (len(node.input) > 2 and node.input[2] not in constants):
            raise Refusal("has a scale or zero point that is computed")
        scale = constants[node.input[1]]
        zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        if scale.size != 1:
            raise Refusal("has one scale per channel, which bytes of activations cannot have")
        kind = self.network.types.get(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0], 0)
        signed = byte_type(kind)
        if signed is None:
            raise Refusal(f"has quantized values of {_type_name(kind)}, neither int8 nor uint8")
        if scale.dtype != np.float32 or not float(scale.reshape(())) > 0:
            raise Refusal("has a scale that is no positive float32")
        return Scaling(float(scale.reshape(())), 0 if zero is None else int(zero.reshape(())), signed)

    def declare(self, name: str, shape: tuple[int, ...], scaling: Scaling) -> str:
        self.tensors[name] = QTensor(name, shape, scaling.scale, scaling.zero, scaling.signed)
        return name

    def scaling_of(self, tensor: str) -> Scaling:
        known = self.tensors[tensor]
        return Scaling(known.scale, known.zero_point, known.signed)

    def bytes_name(self, name: str, scaling: Scaling | None = None) -> str:
        """A name for the bytes of the ONNX tensor ``name``: that of a QuantizeLinear behind it with ``scaling``."""
        for index in self.network.readers.get(name, []):
            node = self.network.nodes[index]
            if scaling is None or node.op_type != "QuantizeLinear" or node.input[0] != name:
                continue
            try:
                if self.scaling(node) == scaling:
                    return str(node.output[0])
            except Refusal:
                continue
        return f"{name}:bytes"

    def moved(self, name: str, view: View) -> str:
        """A byte tensor for the ONNX tensor ``name``, to which the bytes of ``view`` move."""
        scaling = self.scaling_of(view.tensor)
        known = self.bytes_name(name, scaling if view.floating and self.is_plain(view) else None)
        return self.declare(known, self.network.shapes[name], scaling)

    def functions(self, view: View) -> list[NodeProto]:
        """The nodes of a view that change values."""
        nodes = (self.network.nodes[i] for i in view.nodes)
        return [node for node in nodes if node.op_type in self.function_operators]

    function_operators: frozenset[str] = frozenset()

    def is_plain(self, view: View) -> bool:
        """True if the view is the bytes dequantized, or themselves, and no function of them."""
        return not self.functions(view)

    def plain(self, name: str, what: str = "input") -> QTensor:
        """The byte tensor behind the float tensor ``name``. Raises Refusal."""
        view = self.views.get(name)
        if view is None or not view.floating:
            raise Refusal(f"has an {what} that is not quantized")
        if not self.is_plain(view):
            raise Refusal(f"has an {what} that {self.functions(view)[-1].op_type} computes without quantizing it again")
        return self.tensors[view.tensor]

    def quantized_constant(self, name: str) -> QuantizedConstant | None:
        """The integers of a constant behind DequantizeLinear, or None."""
        constants = self.network.constants
        index = self.network.writer.get(name)
        node = self.network.nodes[index] if index is not None else None
        if node is None or node.op_type != "DequantizeLinear" or not all(not n or n in constants for n in node.input):
            return None
        given = attributes(node)
        if given.get("block_size", 0):
            return None
        values, scale = constants[node.input[0]], constants[node.input[1]]
        if scale.dtype != np.float32:
            return None
        zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros((), values.dtype)
        axis = None if scale.size == 1 else given.get("axis", 1) % max(values.ndim, 1)
        return QuantizedConstant(values, scale.reshape(-1), zero.reshape(-1).astype(np.int64), axis)

    def constant(self, name: str) -> Array | None:
        """The value of a constant, dequantized where it must be, or None."""
        if name in self.network.constants:
            return self.network.constants[name]
        found = self.quantized_constant(name)
        if found is None:
            return None
        shape = [1] * found.values.ndim
        if found.axis is not None:
            shape[found.axis] = -1
        centred = found.values.astype(np.int64) - (found.zero if found.axis is None else found.zero.reshape(shape))
        scaled: Array = centred.astype(np.float32) * (found.scale if found.axis is None else found.scale.reshape(shape))
        return scaled.reshape(found.values.shape)

    def tail(self, name: str) -> Tail:
        """What stands between the float tensor ``name`` and its bytes. Raises Refusal where that is no plain path."""
        network = self.network
        nodes: list[str] = []
        clamps: list[tuple[float, float]] = []
        while True:
            readers = [network.nodes[i] for i in network.readers.get(name, [])]
            if name in network.outputs:
                raise Refusal("gives an output of the network in floats")
            if readers and all(node.op_type == "QuantizeLinear" and node.input[0] == name for node in readers):
                break
            if len(readers) != 1 or readers[0].op_type not in (*CLAMPS, *NOTHING):
                what = readers[0].op_type if readers else "nobody"
                raise Refusal(f"has a result that {what} reads before it is quantized")
            nodes.append(readers[0].name)
            if readers[0].op_type in CLAMPS:
                clamps.append(self._bounds(readers[0]))
            name = readers[0].output[0]
        scalings = {self.scaling(node) for node in readers}
        if len(scalings) > 1:
            raise Refusal("has a result that is quantized in more than one way")
        scaling = scalings.pop()
        low, high = scaling.limits
        for least, most in clamps:
            below, above = scaling.byte(least), scaling.byte(most)
            low, high = min(max(low, below), above), max(min(high, above), min(max(low, below), above))
        return Tail(scaling, low, high, tuple(n.output[0] for n in readers), (*nodes, *(n.name for n in readers)))

    def _bounds(self, node: NodeProto) -> tuple[float, float]:
        if node.op_type == "Relu":
            return 0.0, np.inf
        given = attributes(node)
        bounds = [given.get("min", -np.inf), given.get("max", np.inf)]
        for i, name in enumerate(node.input[1:3]):
            value = self.constant(name) if name else np.array((-np.inf, np.inf)[i])
            if value is None:
                raise Refusal("has a clamp behind it whose bounds are computed")
            bounds[i] = float(value.reshape(()))
        return bounds[0], bounds[1]

    def finish(
        self, operation: QConv | QSum | QProduct | QPool | QReshape, tail: Tail, shape: tuple[int, ...], clamped: bool
    ) -> None:
        """Adds an operation that writes ``tail.outputs[0]``; a clamp that it cannot hold follows as a table."""
        output = tail.outputs[0]
        if tail.clamps and not clamped:
            inner = self.declare(f"{output}:unclamped", shape, tail.scaling)
            self.operations.append(replace(operation, output=inner))
            low, high = tail.low, tail.high
            kind = np.int8 if tail.scaling.signed else np.uint8
            table = np.clip(np.arange(256, dtype=np.uint8).view(kind), low, high).astype(kind).tobytes()
            self.operations.append(QTable(f"{operation.name}/clamp", "Clip", inner, output, table, tail.nodes))
        else:
            self.operations.append(operation)
        self.declare(output, shape, tail.scaling)
        self.set_bytes(tail.outputs, output)

    def set_bytes(self, names: tuple[str, ...], tensor: str) -> None:
        """The ONNX tensors ``names`` are the bytes of ``tensor``."""
        self.views.update(dict.fromkeys(names, View(tensor)))


def _type_name(kind: int) -> str:
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind)).name if kind else "an unknown type"
