"""Small QDQ networks, one for each way in which an operator can be read. The name's first word is the operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper

from tests.codegen.quantized.qdq_models import QdqModel

Case = Callable[[QdqModel], object]


def conv(
    axes: int, groups: int = 1, bias: str = "int32", then: str = "", per_channel: bool = True, **given: object
) -> Case:
    def build(m: QdqModel) -> object:
        x = m.input("x", 2, 8, *(9, 8, 7)[:axes])
        kernel = (3, 2, 2)[:axes]
        w = m.weight("w", (12, 8 // groups, *kernel), 0 if per_channel else None, 12)
        inputs = [x, w]
        if bias == "int32":
            inputs.append(m.bias("b", x, w, 12))
        elif bias == "float":
            inputs.append(m.constant("b", m.rng.normal(0, 1, 12).astype(np.float32)))
        y = m.node("Conv", *inputs, kernel_shape=kernel, group=groups, **given)
        return m.output(clamped(m, y, then))

    return build


def clamped(m: QdqModel, y: str, then: str) -> str:
    if then == "Relu":
        return m.node("Relu", y)
    if then == "Clip":
        return m.node("Clip", y, m.constant("low", np.float32(-0.3)), m.constant("high", np.float32(1.5)))
    return y


def transposed(axes: int, groups: int = 1, per_channel: bool = True, **given: object) -> Case:
    def build(m: QdqModel) -> object:
        x = m.input("x", 1, 8, *(5, 4, 3)[:axes])
        kernel = (3, 2, 2)[:axes]
        w = m.weight("w", (8, 12 // groups, *kernel), 1 if per_channel else None, 12 // groups)
        return m.output(m.node("ConvTranspose", x, w, kernel_shape=kernel, group=groups, **given))

    return build


def gemm(transposed_weight: int, per_channel: bool, bias: str = "int32") -> Case:
    def build(m: QdqModel) -> object:
        x = m.input("x", 3, 33)
        shape, axis = ((10, 33), 0) if transposed_weight else ((33, 10), 1)
        w = m.weight("w", shape, axis if per_channel else None, 10)
        floats = m.rng.normal(0, 1, 10).astype(np.float32)
        b = m.bias("b", x, w, 10) if bias == "int32" else m.constant("b", floats)
        return m.output(m.node("Gemm", x, w, b, transB=transposed_weight))

    return build


def matmul(shape: tuple[int, ...], per_channel: bool) -> Case:
    def build(m: QdqModel) -> object:
        w = m.weight("w", (shape[-1], 9), 1 if per_channel else None, 9)
        return m.output(m.node("MatMul", m.input("x", *shape), w))

    return build


def binary(op: str, a: tuple[int, ...], b: tuple[int, ...], then: str = "") -> Case:
    def build(m: QdqModel) -> object:
        return m.output(clamped(m, m.node(op, m.input("a", *a), m.input("b", *b)), then))

    return build


def with_constant(op: str) -> Case:
    def build(m: QdqModel) -> object:
        a = m.input("a", 1, 3, 5, 5)
        m.constant("c.q", m.rng.integers(0, 120, (3, 1, 1)).astype(m.dtype))
        m.nodes.append(helper.make_node("DequantizeLinear", ["c.q", *m.scaling("c")], ["c"]))
        return m.output(m.node(op, a, "c"))

    return build


def unary(op: str, *shape: int, domain: str = "", **given: object) -> Case:
    def build(m: QdqModel) -> object:
        return m.output(m.node(op, m.input("x", *shape), domain=domain, **given))

    return build


def swish(quantized: bool) -> Case:
    def build(m: QdqModel) -> object:
        x = m.input("x", 2, 300)
        gate = m.node("Sigmoid", x)
        return m.output(m.node("Mul", x, m.requantize(gate) if quantized else gate))

    return build


def pad(mode: str, value: float | None = None) -> Case:
    def build(m: QdqModel) -> object:
        widths = [0, 0, 2, 1, 0, 0, 1, 3] if mode != "constant" else [0, 1, 2, 0, 0, 0, -1, 3]
        inputs = [m.input("x", 1, 4, 5, 6), m.constant("pads", np.array(widths))]
        if value is not None:
            inputs.append(m.constant("value", np.float32(value)))
        return m.output(m.node("Pad", *inputs, mode=mode))

    return build


def moved(op: str, shape: tuple[int, ...], *operands: object, **given: object) -> Case:
    def build(m: QdqModel) -> object:
        names = [m.constant(f"c{i}", np.asarray(v)) if v is not None else "" for i, v in enumerate(operands)]
        return m.output(m.node(op, m.input("x", *shape), *names, **given))

    return build


def split(m: QdqModel) -> object:
    y = m.node("Split", m.input("x", 1, 6, 5), m.constant("sizes", np.array([2, 4])), outputs=2, axis=1)
    return m.output(y), m.output(f"{y}.1")


def concat(m: QdqModel) -> object:
    parts = [m.input(name, 1, size, 5) for name, size in (("a", 4), ("b", 2), ("c", 3))]
    return m.output(m.node("Concat", *parts, axis=1))


def affine(m: QdqModel) -> object:
    moved_up = m.node("Add", m.input("x", 2, 300), m.constant("c", np.float32(0.3)))
    return m.output(m.node("Mul", moved_up, m.constant("d", np.float32(0.7))))


def relu_pool_reshape(m: QdqModel) -> object:
    pooled = m.node("MaxPool", m.node("Relu", m.input("x", 1, 13, 4, 4)), kernel_shape=[2, 2])
    return m.output(m.node("Reshape", pooled, m.constant("shape", np.array([0, -1]))))


FULL, COLUMN = (2, 3, 5, 7), (2, 3, 1, 1)
SCALES = np.array([1, 1, 2, 3], np.float32)

EXACT: dict[str, Case] = {
    "Conv 1-D": conv(1, pads=[1, 0], strides=[2]),
    "Conv 2-D": conv(2, pads=[1, 0, 0, 1], dilations=[2, 1]),
    "Conv 2-D, one scale": conv(2, per_channel=False, bias=""),
    "Conv 3-D": conv(3, strides=[2, 1, 1]),
    "Conv grouped": conv(2, groups=4),
    "Conv depthwise": conv(2, groups=8 // 2, pads=[1, 1, 1, 1]),
    "Conv, float bias": conv(2, bias="float"),
    "Conv SAME_UPPER": conv(2, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv SAME_LOWER": conv(2, auto_pad="SAME_LOWER", strides=[2, 2]),
    "Gemm": gemm(0, True),
    "Gemm transposed": gemm(1, True),
    "Gemm, one scale": gemm(1, False),
    "Gemm, float bias": gemm(1, True, bias="float"),
    "MatMul": matmul((3, 17), True),
    "MatMul of rank 3": matmul((2, 5, 17), False),
    "Add": binary("Add", FULL, FULL),
    "Add column": binary("Add", FULL, COLUMN),
    "Add to a column": binary("Add", COLUMN, FULL),
    "Add row": binary("Add", FULL, (7,)),
    "Add constant": with_constant("Add"),
    "Mul": binary("Mul", FULL, FULL),
    "Mul column": binary("Mul", FULL, COLUMN),
    "Mul by a column": binary("Mul", COLUMN, FULL),
    "Mul constant": with_constant("Mul"),
    "Relu": unary("Relu", 2, 3, 50),
    "LeakyRelu": unary("LeakyRelu", 2, 300, alpha=0.2),
    "Sigmoid": unary("Sigmoid", 2, 300),
    "Tanh": unary("Tanh", 2, 300),
    "HardSigmoid": unary("HardSigmoid", 2, 300),
    "HardSwish": unary("HardSwish", 2, 300),
    "Elu": unary("Elu", 2, 300),
    "Gelu": unary("Gelu", 2, 300, domain="com.microsoft"),
    "Erf": unary("Erf", 2, 300),
    "Mul of a gate": swish(quantized=False),
    "Mul of a quantized gate": swish(quantized=True),
    "Add, then Mul of scalars": affine,
    "MaxPool": unary("MaxPool", 2, 5, 9, 8, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 1], ceil_mode=1),
    "MaxPool dilated": unary("MaxPool", 1, 5, 9, 8, kernel_shape=[2, 3], dilations=[2, 1]),
    "GlobalMaxPool": unary("GlobalMaxPool", 2, 50, 2, 1),
    "GlobalAveragePool": unary("GlobalAveragePool", 2, 50, 9, 8),
    "Relu, MaxPool and Reshape": relu_pool_reshape,
    "Transpose": unary("Transpose", 1, 4, 5, 6, perm=[0, 2, 3, 1]),
    "Slice": moved("Slice", (1, 4, 5, 6), [1, -1], [4, -100], [1, 3], [2, -1]),
    "Pad with zeros": pad("constant"),
    "Pad with a value": pad("constant", 0.2),
    "Pad reflect": pad("reflect"),
    "Pad edge": pad("edge"),
    "Concat": concat,
    "Split": split,
    "Resize half_pixel": moved("Resize", (1, 3, 4, 5), None, SCALES, mode="nearest"),
    "Resize asymmetric": moved(
        "Resize", (1, 3, 4, 5), None, SCALES, nearest_mode="floor", coordinate_transformation_mode="asymmetric"
    ),
    "DepthToSpace DCR": unary("DepthToSpace", 1, 12, 4, 5, blocksize=2, mode="DCR"),
    "DepthToSpace CRD": unary("DepthToSpace", 1, 12, 4, 5, blocksize=2, mode="CRD"),
    "SpaceToDepth": unary("SpaceToDepth", 1, 3, 4, 6, blocksize=2),
    "Gather": moved("Gather", (1, 6, 4), [0, 2, 5], axis=1),
    "Gather of one": moved("Gather", (1, 6, 40), -2, axis=1),
    "Tile": moved("Tile", (1, 6, 10), [1, 2, 3]),
    "Expand": moved("Expand", (1, 30, 1), [1, 30, 5]),
    "Reshape": moved("Reshape", (1, 6, 10), [0, -1]),
    "Flatten": unary("Flatten", 1, 6, 10),
    "Squeeze": moved("Squeeze", (1, 30, 1), [2]),
}
"""Equal to onnxruntime's integer kernels in every byte."""

CLOSE: dict[str, Case] = {
    "Conv and Relu": conv(2, then="Relu"),
    "Conv and Clip": conv(2, then="Clip"),
    "ConvTranspose 1-D": transposed(1, strides=[2]),
    "ConvTranspose 2-D": transposed(2, strides=[2, 1], pads=[1, 0, 0, 1], dilations=[1, 2]),
    "ConvTranspose grouped": transposed(2, groups=2, strides=[2, 2], output_padding=[1, 0]),
    "ConvTranspose output_shape": transposed(2, strides=[2, 2], output_shape=[10, 9], per_channel=False),
    "ConvTranspose SAME_UPPER": transposed(2, strides=[2, 2], auto_pad="SAME_UPPER"),
    "Sub": binary("Sub", FULL, FULL),
    "Sub column": binary("Sub", COLUMN, FULL),
    "Add and Relu": binary("Add", FULL, FULL, then="Relu"),
    "Mul and Clip": binary("Mul", FULL, FULL, then="Clip"),
    "AveragePool": unary("AveragePool", 2, 5, 9, 8, kernel_shape=[3, 2], strides=[2, 2]),
    "AveragePool padded": unary("AveragePool", 2, 5, 9, 8, kernel_shape=[3, 2], pads=[1, 1, 0, 1]),
    "AveragePool, padding counted": unary(
        "AveragePool", 2, 5, 9, 8, kernel_shape=[3, 2], pads=[1, 1, 0, 1], count_include_pad=1
    ),
    "ReduceMean": unary("ReduceMean", 2, 5, 9, 8, axes=[2, 3]),
    "ReduceMean, axes dropped": unary("ReduceMean", 2, 5, 9, 8, axes=[-1, -2], keepdims=0),
}
"""onnxruntime calculates these in floats: at most one unit away."""
