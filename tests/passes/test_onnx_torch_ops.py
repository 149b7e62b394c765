"""Every operator of the walk against onnxruntime, in the spelling of every opset that changed it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from passes.onnx_stepper import Stepper
from passes.onnx_torch_ops import OPS
from tests.onnx_models import normal


@dataclass(frozen=True)
class Case:
    """One node: what it reads after ``x`` (arrays become initializers, None is left out), its attributes."""

    op: str
    shape: tuple[int, ...]
    rest: tuple[NDArray[Any] | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1
    covered: bool = True
    """False where the walk has to go to onnxruntime."""

    def __str__(self) -> str:
        said = [f"{k}={v}".replace(" ", "") for k, v in self.attributes.items() if not hasattr(v, "dims")]
        given = "x".join(str(s) for s in self.shape)
        return "-".join(
            [f"{self.op}{self.opset}", given, *("_" if r is None else f"{r.shape}" for r in self.rest), *said]
        )


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def scalar(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


BN = (f32(0.5, 1, 2), f32(0, 1, -1), f32(0.1, -0.2, 0.3), f32(0.5, 1, 2))
IMAGE = (2, 3, 7, 8)

CASES = [
    Case("Conv", IMAGE, (normal(4, 3, 3, 3), normal(4))),
    Case("Conv", IMAGE, (normal(4, 3, 3, 3),), {"pads": [1, 2, 1, 2], "strides": [2, 1], "dilations": [1, 2]}),
    Case("Conv", IMAGE, (normal(4, 3, 3, 3), normal(4)), {"pads": [0, 2, 1, 0]}),
    Case("Conv", IMAGE, (normal(6, 1, 3, 3),), {"group": 3, "auto_pad": "VALID"}),
    Case("Conv", IMAGE, (normal(4, 3, 3, 3),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, covered=False),
    Case("Conv", (2, 3, 9), (normal(4, 3, 3), normal(4)), {"pads": [2, 1]}),
    Case("Conv", (1, 3, 5, 6, 4), (normal(4, 3, 3, 2, 1), normal(4)), {"pads": [1, 0, 0, 1, 1, 0]}),
    Case("Gemm", (4, 5), (normal(5, 3), normal(3))),
    Case("Gemm", (5, 4), (normal(3, 5), normal(4, 1)), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", (4, 5), (normal(5, 3),), {"alpha": 2.0}),
    Case("Gemm", (4, 5), (normal(5, 3), normal(4, 3)), opset=9),
    Case("MatMul", (2, 4, 5), (normal(5, 3),)),
    Case("MatMul", (2, 4, 5), (normal(2, 5, 3),), opset=9),
    Case("MatMul", (5,), (normal(5, 3),)),
    Case("BatchNormalization", IMAGE, BN, {"epsilon": 0.01}),
    Case("BatchNormalization", IMAGE, BN, opset=9),
    Case("BatchNormalization", (4, 3), BN, opset=13),
    Case("MaxPool", IMAGE, (), {"kernel_shape": [3, 2], "strides": [2, 1]}),
    Case("MaxPool", IMAGE, (), {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0], "dilations": [2, 1]}),
    Case("MaxPool", (1, 2, 9), (), {"kernel_shape": [3], "pads": [1, 1]}, opset=9),
    Case("MaxPool", (1, 2, 5, 5, 5), (), {"kernel_shape": [2, 2, 2]}),
    Case("MaxPool", IMAGE, (), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, covered=False),
    Case("MaxPool", IMAGE, (), {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"}, covered=False),
    Case("MaxPool", IMAGE, (), {"kernel_shape": [2, 2], "strides": [2, 2]}, outputs=2, covered=False),
    Case("AveragePool", IMAGE, (), {"kernel_shape": [3, 2], "strides": [2, 1]}),
    Case("AveragePool", IMAGE, (), {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", IMAGE, (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, covered=False),
    Case("AveragePool", IMAGE, (), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, covered=False),
    Case("AveragePool", IMAGE, (), {"kernel_shape": [2, 2], "dilations": [2, 2]}, opset=19, covered=False),
    Case("AveragePool", (1, 2, 9), (), {"kernel_shape": [3]}, opset=9),
    Case("GlobalAveragePool", IMAGE),
    Case("GlobalAveragePool", (2, 3, 4, 2, 5), opset=9),
    Case("ReduceMean", IMAGE, (), {"axes": [2, -1]}),
    Case("ReduceMean", IMAGE, (), {"axes": [1], "keepdims": 0}, opset=9),
    Case("ReduceMean", IMAGE),
    Case("ReduceMean", IMAGE, (ints(-1, 1),), {"keepdims": 0}, opset=18),
    Case("ReduceMean", IMAGE, (), opset=18),
    Case("ReduceMean", IMAGE, (), {"noop_with_empty_axes": 1}, opset=18),
    Case("ReduceMean", IMAGE, (ints(),), {"noop_with_empty_axes": 1}, opset=18),
    Case("Reshape", IMAGE, (ints(0, -1, 4),)),
    Case("Reshape", IMAGE, (ints(2, 3, 56),), opset=9),
    Case("Reshape", IMAGE, (ints(6, 7, 8),), {"allowzero": 1}),
    Case("Flatten", IMAGE),
    Case("Flatten", IMAGE, (), {"axis": 0}, opset=9),
    Case("Flatten", IMAGE, (), {"axis": 4}),
    Case("Flatten", IMAGE, (), {"axis": -1}),
    Case("Flatten", IMAGE, (), {"axis": -4}),
    Case("Transpose", IMAGE),
    Case("Transpose", IMAGE, (), {"perm": [0, 2, 3, 1]}),
    Case("Concat", IMAGE, (normal(2, 1, 7, 8), normal(2, 2, 7, 8)), {"axis": 1}),
    Case("Concat", IMAGE, (normal(2, 3, 7, 1),), {"axis": -1}, opset=11),
    Case("Clip", IMAGE, (), {"min": -0.5, "max": 0.25}, opset=9),
    Case("Clip", IMAGE, (), {"max": 0.25}, opset=9),
    Case("Clip", IMAGE, (scalar(-0.5), scalar(0.25)), opset=11),
    Case("Clip", IMAGE, (scalar(-0.5),)),
    Case("Clip", IMAGE, (None, scalar(0.25))),
    Case("Clip", IMAGE),
    Case("Softmax", IMAGE, (), opset=9),  # over all axes from 1 on
    Case("Softmax", IMAGE, (), {"axis": 2}, opset=11),
    Case("Softmax", IMAGE, (), {"axis": -1}, opset=11),
    Case("Softmax", IMAGE, (), {"axis": 0}, opset=11),
    Case("Softmax", IMAGE, opset=13),
    Case("Softmax", IMAGE, (), {"axis": 1}),
    Case("Squeeze", (1, 3, 1, 2), (), {"axes": [0]}, opset=9),
    Case("Squeeze", (1, 3, 1, 2), (), {"axes": [0, -2]}, opset=11),
    Case("Squeeze", (1, 3, 1, 2), (ints(-2, 0),), opset=13),
    Case("Squeeze", (1, 3, 1, 2), opset=13),
    Case("Unsqueeze", (3, 2), (), {"axes": [0, 3]}, opset=9),
    Case("Unsqueeze", (3, 2), (), {"axes": [-1, 1]}, opset=11),
    Case("Unsqueeze", (3, 2), (ints(-1, 0),), opset=13),
    Case("Slice", IMAGE, (), {"starts": [1, 0], "ends": [3, -2], "axes": [1, 3]}, opset=9),
    Case("Slice", IMAGE, (), {"starts": [0, -2], "ends": [1, 99]}, opset=9),
    Case("Slice", IMAGE, (ints(1, -5), ints(2**63 - 1, -1), ints(2, -1), ints(2, 3)), opset=11),
    Case("Slice", IMAGE, (ints(-99), ints(4), ints(3)), opset=13),
    Case("Slice", IMAGE, (ints(0, 1), ints(1, 2))),
    Case("Slice", IMAGE, (ints(-1), ints(-99), ints(3), ints(-2)), covered=False),
    Case("Pad", IMAGE, (ints(0, 0, 1, 2, 0, 1, 0, 3),), opset=11),
    Case("Pad", IMAGE, (ints(0, 0, 1, -2, 0, 0, -1, 3), scalar(1.5))),
    Case("Pad", IMAGE, (ints(1, 2), scalar(0.5), ints(-1)), opset=18, covered=False),
    Case("Pad", IMAGE, (), {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 2.0}, opset=9, covered=False),
    Case("Pad", IMAGE, (ints(0, 0, 1, 2, 0, 0, 0, 3),), {"mode": "reflect"}, covered=False),
    Case("LeakyRelu", IMAGE, (), {"alpha": 0.3}),
    Case("LeakyRelu", IMAGE, opset=9),
    Case("PRelu", IMAGE, (normal(3, 1, 1),)),
    Case("PRelu", IMAGE, (scalar(0.3).reshape(1),), opset=9),
    Case("HardSigmoid", IMAGE),
    Case("HardSigmoid", IMAGE, (), {"alpha": 0.4, "beta": 0.1}),
    *(
        Case(op, IMAGE)
        for op in ("Relu", "Sigmoid", "Tanh", "Exp", "Abs", "Neg", "Erf", "HardSwish", "Identity")
    ),
    *(Case(op, IMAGE, (normal(3, 1, 1),), opset=n) for op in ("Add", "Sub", "Mul") for n in (7, 17)),
    Case("Add", (3, 1), (normal(2, 3, 4),)),
    Case("Pow", IMAGE, (scalar(2.0),)),
    Case("Pow", IMAGE, (np.array(3, np.int64),)),
    *(Case("Div", IMAGE, (normal(3, 1, 1),), opset=n) for n in (7, 17)),
    Case("Sum", IMAGE, (normal(3, 1, 1), normal(2, 1, 7, 1)), opset=8),
    Case("Sum", IMAGE),
    Case("Gather", IMAGE, (ints(2, 0, -3),), {"axis": 1}),
    Case("Gather", IMAGE, (ints(1, 0, 1, -1).reshape(2, 2),), {"axis": -2}, opset=11),
    Case("Gather", IMAGE, (np.array(1, np.int32),), opset=9),
    Case("Gather", (5,), (np.array(-2, np.int64),)),
    Case("Split", (2, 6), (ints(2, 4),), {"axis": 1}, outputs=2),
    Case("Split", (2, 6), (ints(1, 0, 5),), {"axis": -1}, outputs=3),
    Case("Split", (2, 6), (), {"axis": 1}, outputs=3),
    Case("Split", (4, 6), opset=9, outputs=2),
    Case("Split", (4, 6), (), {"axis": 1, "split": [5, 1]}, opset=11, outputs=2),
    Case("Split", (2, 7), (), {"axis": 1, "num_outputs": 3}, opset=18, outputs=3),
    Case("LayerNormalization", (2, 3, 5), (normal(5), normal(5))),
    Case("LayerNormalization", (2, 3, 5), (normal(5),), {"epsilon": 0.1}, outputs=3),
    Case("LayerNormalization", (2, 3, 5, 4), (normal(3, 5, 4), normal(3, 5, 4)), {"axis": 1}),
    Case("Gelu", IMAGE, opset=20),
    Case("Gelu", IMAGE, (), {"approximate": "tanh"}, opset=20),
    Case("ConvTranspose", IMAGE, (normal(3, 4, 3, 3), normal(4))),
    Case("ConvTranspose", IMAGE, (normal(3, 4, 3, 2),), {"strides": [2, 3], "pads": [1, 0, 0, 1]}, opset=9),
    Case("ConvTranspose", IMAGE, (normal(3, 2, 3, 3), normal(6)), {"group": 3, "dilations": [2, 1]}),
    Case("ConvTranspose", IMAGE, (normal(3, 4, 3, 3), normal(4)), {"strides": [2, 2], "output_padding": [1, 1]}),
    Case(
        "ConvTranspose", IMAGE, (normal(3, 4, 2, 2),),
        {"strides": [3, 3], "output_padding": [2, 1], "pads": [0, 1, 1, 0]},
    ),
    *(
        Case(
            "ConvTranspose", IMAGE, (normal(3, 4, 3, 3), normal(4)), {"strides": [2, 3], "auto_pad": mode, **more}
        )
        for mode in ("SAME_UPPER", "SAME_LOWER")
        for more in ({}, {"output_shape": [14, 23]})
    ),
    Case("ConvTranspose", IMAGE, (normal(3, 4, 3, 3),), {"strides": [2, 2], "auto_pad": "VALID"}),
    Case("ConvTranspose", IMAGE, (normal(3, 4, 3, 3),), {"strides": [2, 2], "output_shape": [14, 15]}),
    Case("ConvTranspose", (1, 3, 6), (normal(3, 4, 3), normal(4)), {"strides": [2], "pads": [1, 1]}),
    Case("ConvTranspose", (1, 3, 3, 4, 2), (normal(3, 2, 2, 3, 2),), {"strides": [2, 1, 2]}),
    *(
        Case(
            "Resize", IMAGE, (None, f32(1, 1, *scales)),
            {"mode": mode, "coordinate_transformation_mode": rule}, opset=19,
            # where rounding decides about a tie, it is left to onnxruntime
            covered=mode != "nearest" or scales == (2, 2) or rule in ("align_corners", "asymmetric"),
        )
        for mode in ("nearest", "linear", "cubic")
        for rule in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
        for scales in ((2, 2), (0.6, 1.3))
    ),
    *(
        Case("Resize", IMAGE, (None, None, ints(2, 3, 14, 4)), {"mode": mode, "coordinate_transformation_mode": rule})
        for mode in ("nearest", "linear", "cubic")
        for rule in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    ),
    *(
        Case("Resize", IMAGE, (None, f32(1, 1, 2, 1.5)), {"nearest_mode": mode, "coordinate_transformation_mode": rule})
        for mode in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        for rule in ("half_pixel", "asymmetric")
    ),
    Case("Resize", IMAGE, (f32(), f32(1, 1, 2, 2)), {"mode": "linear"}, opset=11),
    Case("Resize", IMAGE, (None, f32(1, 1, 1.1, 1)), {"mode": "linear"}),  # to the same size
    Case("Resize", IMAGE, (None, f32(1, 1, 2, 2)), {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}),
    Case("Resize", IMAGE, (None, None, ints(9, 4)), {"mode": "linear", "axes": [3, 2]}, opset=18),
    Case("Resize", IMAGE, (f32(0, 0, 0, 0, 1, 1, 1, 1), f32(1, 1, 2, 2)),
         {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}, covered=False),
    Case("Resize", IMAGE, (None, f32(1, 1, 0.5, 0.5)), {"mode": "linear", "antialias": 1}, opset=18, covered=False),
    Case("Resize", IMAGE, (f32(1, 1, 2, 3),), {"mode": "nearest"}, opset=10),
    Case("Resize", IMAGE, (f32(1, 1, 2, 1.5),), {"mode": "linear"}, opset=10),
    Case("Resize", IMAGE, (f32(1, 1, 0.5, 0.5),), {"mode": "nearest"}, opset=10, covered=False),
    Case("Upsample", IMAGE, (), {"scales": [1.0, 1.0, 2.0, 3.0]}, opset=7),
    Case("Upsample", IMAGE, (f32(1, 1, 2, 2),), {"mode": "linear"}, opset=9),
    # nothing of the table: the walk goes to onnxruntime
    Case("Softplus", IMAGE, covered=False),
    Case("Dropout", IMAGE, outputs=2, covered=False),
    Case("Shape", IMAGE, covered=False),
]  # fmt: skip


def built(case: Case) -> onnx.ModelProto:
    names = [f"i{n}" if value is not None else "" for n, value in enumerate(case.rest)]
    outputs = [f"y{n}" for n in range(case.outputs)]
    node = helper.make_node(case.op, ["x", *names], outputs, **case.attributes)
    stored = [numpy_helper.from_array(v, n) for v, n in zip(case.rest, names, strict=True) if v is not None]
    model = modelled([node], case.shape, outputs, stored, case.opset)
    for info in model.graph.output:  # the operators here have outputs of several types
        info.type.Clear()
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    del model.graph.output[:]
    model.graph.output.extend(inferred.graph.output)
    return model


def modelled(
    nodes: list[onnx.NodeProto],
    shape: tuple[int, ...],
    outputs: list[str],
    stored: list[onnx.TensorProto],
    opset: int = 17,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def reference(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def never(stop: object) -> torch.Tensor:
    raise AssertionError("a network without sites stopped")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_onnxruntime_computes(case: Case) -> None:
    model = built(case)
    x = normal(*case.shape, seed=1)
    stepper = Stepper(model, [])
    found = stepper.run({"x": x}, never)
    for (name, value), wanted in zip(found.items(), reference(model, {"x": x}), strict=True):
        assert name in stepper.outputs
        assert value.numpy().dtype == wanted.dtype and tuple(value.shape) == wanted.shape
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert stepper.cut == (set() if case.covered else {case.op})


@pytest.mark.parametrize("op", ["Sqrt"])
def test_operators_of_positive_numbers(op: str) -> None:
    model = built(Case(op, (3, 4)))
    x = np.abs(normal(3, 4)) + 0.1
    np.testing.assert_allclose(Stepper(model, []).run({"x": x}, never)["y0"], np.sqrt(x), rtol=1e-6)


def test_a_choice_between_two_passes_gradients_to_the_one_chosen() -> None:
    other = numpy_helper.from_array(normal(3, 1), "c")
    nodes = [helper.make_node("Greater", ["x", "c"], ["t"]), helper.make_node("Where", ["t", "x", "c"], ["y"])]
    model = modelled(nodes, (2, 3, 4), ["y"], [other])
    x = torch.from_numpy(normal(2, 3, 4, seed=1)).requires_grad_()
    y = Stepper(model, []).run({"x": x}, never)["y"]
    np.testing.assert_array_equal(y.detach(), reference(model, {"x": x.detach().numpy()})[0])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    np.testing.assert_array_equal(gradient, x.detach().numpy() > normal(3, 1))


def test_integers_are_divided_towards_zero() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Div", ["i", "d"], ["q"]),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    model = modelled(nodes, (5,), ["y"], [numpy_helper.from_array(ints(2, -2, 3, 3, -3), "d")])
    feeds = {"x": f32(-7, -7, -7, 8, 8)}
    found = Stepper(model, []).run(feeds, never)["y"]
    np.testing.assert_array_equal(found, [-3, 3, -2, 2, -2])
    np.testing.assert_array_equal(found, reference(model, feeds)[0])


def test_the_mean_of_integers_is_onnxruntimes() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("ReduceMean", ["i"], ["m"], axes=[1]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    model = modelled(nodes, (2, 4), ["y"], [])
    feeds = {"x": 10 * normal(2, 4)}
    np.testing.assert_array_equal(Stepper(model, []).run(feeds, never)["y"], reference(model, feeds)[0])


def test_a_constant_node() -> None:
    value = normal(3, 1)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(value)),
        helper.make_node("Constant", [], ["d"], value_float=2.0),
        helper.make_node("Mul", ["x", "c"], ["t"]),
        helper.make_node("Add", ["t", "d"], ["y"]),
    ]
    model = modelled(nodes, (3, 4), ["y"], [])
    x = normal(3, 4, seed=2)
    stepper = Stepper(model, [])
    np.testing.assert_allclose(stepper.run({"x": x}, never)["y"], x * value + 2, rtol=1e-6)
    assert stepper.cut == {"Constant"}  # the one of a plain attribute


def test_every_operator_of_the_table_is_tested_here() -> None:
    seen = {case.op for case in CASES if case.covered} | {"Sqrt", "Constant", "Where"}
    assert seen == set(OPS)


@pytest.mark.parametrize("case", [c for c in CASES if c.covered and c.op != "Identity"], ids=str)
def test_gradients_pass(case: Case) -> None:
    stepper = Stepper(built(case), [])
    x = torch.from_numpy(normal(*case.shape, seed=1)).requires_grad_()

    def weighed(given: torch.Tensor) -> torch.Tensor:
        outputs = stepper.run({"x": given}, never).values()
        upstream = [torch.from_numpy(normal(*y.shape, seed=4 + n)).reshape(y.shape) for n, y in enumerate(outputs)]
        return sum((y.double() * u).sum() for y, u in zip(outputs, upstream, strict=True))

    direction = torch.from_numpy(normal(*case.shape, seed=3))
    (gradient,) = torch.autograd.grad(weighed(x), x)
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (weighed((x + s * direction).detach()) for s in (step, -step))
    slope = float(ahead - behind) / (2 * step)
    # float32 differences over a step of 1e-2; kinks of piecewise-linear operators lie within a step of some inputs
    scale = float((gradient * direction).abs().sum()) + 1e-3
    assert abs(float((gradient * direction).sum()) - slope) < 0.05 * scale
