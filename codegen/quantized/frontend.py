"""Reads a QDQ network, as onnxruntime's static quantizer writes it, into operations on bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto, NodeProto, helper

from codegen.quantized import elementwise, joins, layers, moves, pools
from codegen.quantized.graph import HostTensor, QuantizedGraph
from codegen.quantized.host import cut
from codegen.quantized.onnx_network import Network, byte_type
from codegen.quantized.reader import Reader
from codegen.quantized.simplify import simplify
from codegen.quantized.views import Refusal, Scaling, View
from passes.errors import UnsupportedError

Handler = Callable[[Reader, int, NodeProto], None]

_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(elementwise.UNARY | elementwise.BINARY, elementwise.function),
    **dict.fromkeys(elementwise.SAME, elementwise.same),
    "QuantizeLinear": elementwise.quantize,
    "DequantizeLinear": elementwise.dequantize,
    "Conv": layers.conv,
    "ConvTranspose": layers.conv,
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    **dict.fromkeys(("Add", "Sub", "Sum"), elementwise.add),
    "Mul": elementwise.multiply,
    "MaxPool": pools.max_pool,
    "GlobalMaxPool": pools.global_max_pool,
    "AveragePool": pools.average_pool,
    "GlobalAveragePool": pools.global_average_pool,
    **dict.fromkeys(("ReduceMean", "ReduceMax"), pools.reduce),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), moves.reshape),
    "Transpose": moves.transpose,
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), moves.depth_to_space),
    "Slice": moves.crop,
    "Split": moves.split,
    "Gather": moves.gather,
    **dict.fromkeys(("Expand", "Tile"), moves.expand),
    **dict.fromkeys(("Resize", "Upsample"), moves.resize),
    "Pad": joins.pad,
    "Concat": joins.concat,
}
_CONTRIBUTED = frozenset({"Gelu", "FastGelu", "QuickGelu", "QuantizeLinear", "DequantizeLinear"})
"""What is read of onnxruntime's own operators."""


def read_qdq(source: str | Path | ModelProto, shapes: Mapping[str, tuple[int, ...]] | None = None) -> QuantizedGraph:
    """The integer network that a QDQ network computes.

    ``shapes`` binds inputs with symbolic dimensions; a symbolic leading dimension is 1 where nothing is said. What is
    no operation on bytes becomes a :class:`QHost` with the reason. Raises UnsupportedError where nothing of the
    network is quantized, InputError where the file cannot be used, UsageError where ``shapes`` do not fit.
    """
    network = Network.read(source, shapes or {})
    where = "the network" if isinstance(source, ModelProto) else str(source)
    operators = {node.op_type for node in network.nodes}
    if not operators & {"QuantizeLinear", "DequantizeLinear"}:
        if any(op.startswith("QLinear") or op.endswith("Integer") for op in operators):
            raise UnsupportedError(f"{where} is quantized with integer operators; quantize it in the QDQ format")
        raise UnsupportedError(
            f"{where} is a network of floats: it has no QuantizeLinear and no DequantizeLinear. Quantize it first, "
            "with codegen.quantized.quantize or onnxruntime.quantization.quantize_static in the QDQ format"
        )
    reader = Reader(network)
    reader.function_operators = elementwise.FUNCTIONS
    inputs = [_input(reader, name) for name in network.inputs]
    for index, node in enumerate(network.nodes):
        _visit(reader, index, node)
    outputs = [_output(reader, name) for name in network.outputs]
    results = tuple(name for name in outputs if name not in reader.tensors)
    host = cut(reader, results)
    return simplify(
        QuantizedGraph(
            tensors=reader.tensors,
            operations=(*reader.operations, *host),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            float_inputs=tuple(i in reader.tensors and i != n for i, n in zip(inputs, network.inputs, strict=True)),
            float_outputs=tuple(
                o in reader.tensors and reader.views[n].floating for o, n in zip(outputs, network.outputs, strict=True)
            ),
            input_names=tuple(network.inputs),
            output_names=tuple(network.outputs),
            constants=reader.constants,
            host_tensors=reader.host_tensors,
        )
    )


def _visit(reader: Reader, index: int, node: NodeProto) -> None:
    if all(name in reader.views for name in node.output if name):
        return  # part of an operation already
    known = node.domain in ("", "ai.onnx") or (node.domain == "com.microsoft" and node.op_type in _CONTRIBUTED)
    handler = _HANDLERS.get(node.op_type) if known else None
    before = len(reader.operations)
    try:
        if handler is None:
            raise Refusal("is no operation on bytes")
        missing = [n for n in (*node.input, *node.output) if n and n not in reader.network.shapes]
        if missing:
            raise Refusal(f"has a tensor {missing[0]!r} of unknown shape")
        handler(reader, index, node)
    except Refusal as reason:
        del reader.operations[before:]
        reader.refused[index] = str(reason)


def _input(reader: Reader, name: str) -> str:
    """The tensor that stands for an input: its bytes where it is bytes or only ever quantized in one way."""
    network = reader.network
    signed = byte_type(network.types[name])
    readers = [network.nodes[i] for i in network.readers.get(name, [])]
    if signed is not None:
        # One scale is as good as another where nobody dequantizes.
        scaling = Scaling(1.0, 0, signed)
        for node in readers:
            if node.op_type == "DequantizeLinear":
                try:
                    scaling = reader.scaling(node)
                except Refusal:
                    continue
                break
        reader.declare(name, network.shapes[name], scaling)
        reader.views[name] = View(name)
        return name
    try:
        scalings = {reader.scaling(node) if node.op_type == "QuantizeLinear" else None for node in readers}
    except Refusal:
        scalings = {None}
    if len(scalings) == 1 and name not in network.outputs and (only := scalings.pop()) is not None:
        first = str(readers[0].output[0])
        reader.declare(first, network.shapes[name], only)
        reader.set_bytes(tuple(node.output[0] for node in readers), first)
        return first
    dtype = helper.tensor_dtype_to_np_dtype(network.types[name]).name
    reader.host_tensors[name] = HostTensor(name, network.shapes[name], dtype)
    return name


def _output(reader: Reader, name: str) -> str:
    """The tensor that stands for an output: bytes where it is them, or them dequantized."""
    view = reader.views.get(name)
    if view is not None and reader.is_plain(view):
        return view.tensor
    if name in reader.network.constants:
        raise UnsupportedError(f"the output {name!r} is a constant")
    return name
