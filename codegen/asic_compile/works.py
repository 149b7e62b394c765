"""A quantized network as the price list sees it: one :class:`passes.core.cost.OpWork` per operation."""

from __future__ import annotations

from math import prod

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
    QuantizedGraph,
)
from codegen.quantized.operands import reads, writes
from passes.core.cost import OpWork, StageWork

_KINDS: dict[type[QOperation], str] = {QSum: "Add", QProduct: "Mul", QTable: "Relu", QMove: "Concat"}
"""ONNX operators that stand for operations of any name: a table is an activation, a move a copy."""


def op_works(graph: QuantizedGraph) -> list[OpWork]:
    """One work per operation of ``graph``, in its order; then one per output of the network, which reads it.

    A layer whose input has a zero point has a bias, for that is where the zero point goes.
    """
    works = [_work(graph, operation) for operation in graph.operations]
    for name in graph.outputs:
        works.append(OpWork(f"output {name}", "Identity", None, (_shape(graph, name),), (), (name,), ()))
    return works


def stage_work(graph: QuantizedGraph, operation: QConv) -> StageWork:
    """The work of a convolution or a linear layer; the leading axes of a matrix are its rows."""
    shape = graph.tensors[operation.input].shape
    g = operation.geometry
    bias = operation.bias is not None or graph.tensors[operation.input].zero_point != 0
    out_channels = operation.weight.shape[0]
    if g.ndim == 0:
        return StageWork(g, shape[-1], out_channels, (), prod(shape[:-1]), bias)
    return StageWork(g, shape[1], out_channels, shape[2:], shape[0], bias)


def _shape(graph: QuantizedGraph, name: str) -> tuple[int, ...]:
    return graph.tensors[name].shape if name in graph.tensors else graph.host_tensors[name].shape


def _work(graph: QuantizedGraph, operation: QOperation) -> OpWork:
    inputs, outputs = tuple(reads(operation)), tuple(writes(operation))
    shapes = [tuple(_shape(graph, name) for name in names) for names in (inputs, outputs)]
    kind = _KINDS.get(type(operation), operation.op)
    stage = None
    params = 0
    if isinstance(operation, QConv):
        kind = "ConvTranspose" if operation.geometry.transposed else ("Conv" if operation.geometry.ndim else "Gemm")
        stage = stage_work(graph, operation)
        params = operation.weight.size + (operation.weight.shape[0] if stage.bias else 0)
    elif isinstance(operation, QPool):
        kind = "MaxPool" if operation.kind is Pool.MAX else "AveragePool"
    elif isinstance(operation, QReshape):
        kind = "Reshape"
    elif isinstance(operation, QHost):
        kind = "Host"
    width = 1
    return OpWork(operation.name, kind, stage, shapes[0], shapes[1], inputs, outputs, params, params * width)
