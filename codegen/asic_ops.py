"""Which unit of an accelerator runs an ONNX operator, and how many elementary operations it is there."""

from __future__ import annotations

from math import prod

from passes.core.cost import OpWork

TRANSPARENT = frozenset({"Identity", "Dropout", "Cast", "QuantizeLinear", "DequantizeLinear"})
"""Nothing happens to int8 data in DRAM: these neither cost nor separate what stands before and after."""

FREE = TRANSPARENT | {
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Shape", "Size", "Constant", "ConstantOfShape"),
}
"""Shape operators, which leave the bytes where they are."""

ACTIVATIONS = frozenset(
    {
        *("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Celu"),
        *("Gelu", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Swish"),
    }
)
"""Element-wise functions of one map, applied to a result on its way out of the accumulators."""

CONSTANT_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
"""With a constant per channel, these are biases and scales: applied on the way out like an activation."""

_PER_ELEMENT = {
    **dict.fromkeys(ACTIVATIONS | CONSTANT_ARITHMETIC, 1),
    **dict.fromkeys(
        ("Abs", "Neg", "Sqrt", "Exp", "Log", "Reciprocal", "Erf", "Sin", "Cos", "Floor", "Ceil", "Round"), 1
    ),
    **dict.fromkeys(("Max", "Min", "Sum", "Mean", "Pow", "Mod", "Where", "Equal", "Greater", "Less", "Not", "And"), 1),
    **dict.fromkeys(("Or", "GreaterOrEqual", "LessOrEqual", "Sign", "IsNaN"), 1),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"), 1),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1"), 1),
    **dict.fromkeys(("ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceLogSum"), 2),
    **dict.fromkeys(("BatchNormalization",), 2),
    **dict.fromkeys(("Softmax", "LogSoftmax"), 4),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization", "LRN", "LpNormalization"), 5),
    **dict.fromkeys(("RMSNormalization", "MeanVarianceNormalization"), 4),
    **dict.fromkeys(("Concat", "Split", "Slice", "Transpose", "Pad", "Gather", "Expand", "Tile", "Upsample"), 1),
    **dict.fromkeys(("Resize", "DepthToSpace", "SpaceToDepth", "CumSum", "ArgMax", "ArgMin", "ReverseSequence"), 1),
}
"""Elementary operations per element of the larger of input and output; transcendental functions are table look-ups.

A pooling window's overlap is not seen here: each input element counts once.
"""

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})

_FEW = 16


def is_shape_arithmetic(op: OpWork) -> bool:
    """Whether ``op`` computes shapes, not data: a few numbers without axes, and no body of a control-flow operator."""
    small = all(len(shape) <= 1 and prod(shape) <= _FEW for shape in (*op.input_shapes, *op.output_shapes))
    return small and (op.op in _PER_ELEMENT or op.op == "Range")


def vector_operations(op: OpWork) -> int | None:
    """Elementary operations of ``op`` on the vector unit; None where the unit cannot run it."""
    if op.op not in _PER_ELEMENT:
        return None
    return _PER_ELEMENT[op.op] * max(elements(op.input_shapes), elements(op.output_shapes))


def host_macs(op: OpWork) -> int:
    """An estimate of the multiply-adds of an operator on the host: its stage's, or each of its weights once."""
    return op.stage.macs if op.stage is not None else op.weight_params


def elements(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Elements of all tensors together."""
    return sum(prod(shape) for shape in shapes)
