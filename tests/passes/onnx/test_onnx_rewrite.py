"""Read a layer, put an exact chain in its place, compare with onnxruntime: over generated attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from passes.core.reference import apply_chain, relative_l2
from passes.core.site import Chain, Stage
from passes.onnx_graph import OnnxGraph
from tests.passes.onnx.exact import dense, inner, model_of, outer, run

BOUND = 1e-5
"""Relative L2 in float32, from the issue; factors are formed in float64 and rounded once."""
Maker = Callable[[Stage], Chain]


def check(model: onnx.ModelProto, feeds: dict[str, Any], ops: dict[str, int], maker: Maker, stages: int) -> None:
    """Replaces the only site by ``maker``'s chain; outputs stay, and each stage is an operator of ``ops``."""
    before = run(model, feeds)
    graph = OnnxGraph.from_model(model)
    scan = graph.sites()
    assert [note.reason for note in scan.kept] == []
    (site,) = scan.sites
    graph.replace(site, maker(site.stage))
    after = graph.model()
    onnx.checker.check_model(after, full_check=True)
    graph.check()
    found = [node.op_type for node in after.graph.node]
    assert sum(found.count(op) for op in ops) == stages
    names = [node.name for node in after.graph.node if node.op_type in ops]
    assert names == [f"{site.name}/{maker.__name__}_{i}" for i in range(stages)]
    assert after.graph.input == model.graph.input
    assert after.graph.output == model.graph.output
    for value, reference in zip(run(after, feeds), before, strict=True):
        assert value.shape == reference.shape
        assert value.dtype == reference.dtype
        assert relative_l2(value, reference) < BOUND
    again = OnnxGraph.from_model(after).sites()
    assert len(again.sites) == stages, again.kept


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, Any]]:
    n = draw(st.integers(1, 3))
    each = lambda low, high: draw(st.lists(st.integers(low, high), min_size=n, max_size=n))  # noqa: E731
    groups, per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kernel, strides, dilations = each(1, 3), each(1, 3), each(1, 2)
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    mode = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", "absent"]))
    if mode in ("NOTSET", "absent"):
        attributes["pads"] = each(0, 2) + each(0, 2)
    elif max(dilations) > 1:  # onnxruntime refuses SAME with dilations in some ranks
        attributes["dilations"] = [1] * n
    if mode != "absent":
        attributes["auto_pad"] = mode
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    spatial = [d * (k - 1) + 1 + extra for d, k, extra in zip(dilations, kernel, each(0, 4), strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = {"w": rng.standard_normal((groups * per_out, per_in, *kernel)).astype(np.float32)}
    inputs = ["x", "w"]
    if draw(st.booleans()):
        weights["b"] = rng.standard_normal(groups * per_out).astype(np.float32)
        inputs.append("b")
    shape = [draw(st.integers(1, 2)), groups * per_in, *spatial]
    node = helper.make_node("Conv", inputs, ["y"], "conv", **attributes)
    batch = draw(st.sampled_from([shape[0], "N"]))
    model = model_of([node], {"x": [batch, *shape[1:]]}, {"y": [None] * (n + 2)}, weights, draw(st.integers(11, 22)))
    return model, {"x": rng.standard_normal(shape).astype(np.float32)}


@settings(max_examples=120)
@given(convolutions(), st.sampled_from([dense, outer, inner]))
def test_conv(case: tuple[onnx.ModelProto, dict[str, Any]], maker: Maker) -> None:
    check(*case, {"Conv": 1}, maker, 1 if maker is dense else 2)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, Any]]:
    n = draw(st.integers(1, 2))
    each = lambda low, high: draw(st.lists(st.integers(low, high), min_size=n, max_size=n))  # noqa: E731
    groups, per_in, per_out = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, strides, dilations, spatial = each(1, 3), each(1, 3), each(1, 2), each(2, 5)
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    reach = [(i - 1) * s + d * (k - 1) + 1 for i, s, d, k in zip(spatial, strides, dilations, kernel, strict=True)]
    mode = draw(st.sampled_from(["pads", "output_padding", "output_shape", "same"]))
    if mode in ("pads", "output_padding"):
        attributes["pads"] = [min(p, (r - 1) // 2) for p, r in zip(each(0, 2) * 2, reach * 2, strict=True)]
    if mode == "output_padding":
        attributes["output_padding"] = [min(p, s - 1) for p, s in zip(each(0, 2), strides, strict=True)]
    if mode == "output_shape":
        attributes["output_shape"] = [max(1, r - cut) for r, cut in zip(reach, each(0, 3), strict=True)]
        attributes["auto_pad"] = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER"]))
    if mode == "same":
        kernel = [max(k, s) for k, s in zip(kernel, strides, strict=True)]
        attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = {"w": rng.standard_normal((groups * per_in, per_out, *kernel)).astype(np.float32)}
    inputs = ["x", "w"]
    if draw(st.booleans()):
        weights["b"] = rng.standard_normal(groups * per_out).astype(np.float32)
        inputs.append("b")
    node = helper.make_node("ConvTranspose", inputs, ["y"], "up", **attributes)
    shape = [2, groups * per_in, *spatial]
    model = model_of([node], {"x": ["N", *shape[1:]]}, {"y": [None] * (n + 2)}, weights, 17)
    return model, {"x": rng.standard_normal(shape).astype(np.float32)}


@settings(max_examples=120)
@given(transposed_convolutions(), st.sampled_from([dense, outer, inner]))
def test_transposed_conv(case: tuple[onnx.ModelProto, dict[str, Any]], maker: Maker) -> None:
    check(*case, {"ConvTranspose": 1, "Conv": 1}, maker, 1 if maker is dense else 2)


@st.composite
def gemms(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, Any]]:
    rows, inner_size, outer_size = (draw(st.integers(1, 5)) for _ in range(3))
    trans_a, trans_b, left = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n = (outer_size, rows) if left else (rows, outer_size)
    a = (inner_size, m) if trans_a else (m, inner_size)
    b = (n, inner_size) if trans_b else (inner_size, n)
    constant, free = (a, b) if left else (b, a)
    weights = {"w": rng.standard_normal(constant).astype(np.float32)}
    inputs = ["w", "x"] if left else ["x", "w"]
    attributes: dict[str, Any] = {"transA": int(trans_a), "transB": int(trans_b)}
    if draw(st.booleans()):
        attributes["alpha"] = draw(st.sampled_from([0.5, -2.0]))
        attributes["beta"] = draw(st.sampled_from([0.25, 3.0]))
    shapes = [(), (1,), (1, 1), (m, 1)] if left else [(), (1,), (n,), (1, n), (1, 1)]
    c = draw(st.sampled_from([None, *shapes]))
    if c is not None:
        weights["c"] = rng.standard_normal(c).astype(np.float32)
        inputs.append("c")
    opset = 17 if c is None else draw(st.sampled_from([9, 13, 17]))
    node = helper.make_node("Gemm", inputs, ["y"], "fc", **attributes)
    return model_of([node], {"x": list(free)}, {"y": [m, n]}, weights, opset), {
        "x": rng.standard_normal(free).astype(np.float32)
    }


@settings(max_examples=150)
@given(gemms(), st.sampled_from([dense, outer]))
def test_gemm(case: tuple[onnx.ModelProto, dict[str, Any]], maker: Maker) -> None:
    check(*case, {"Gemm": 1}, maker, len(maker(Stage(np.eye(2), None))))


@st.composite
def matmuls(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, Any]]:
    inner_size, outer_size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    left = draw(st.booleans())
    lead = draw(st.lists(st.integers(1, 3), max_size=3))
    free = [*lead, inner_size] if not left else [*lead, inner_size, 2] if lead or draw(st.booleans()) else [inner_size]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = {"w": rng.standard_normal((outer_size, inner_size) if left else (inner_size, outer_size))}
    if len(free) > 2 and draw(st.booleans()):
        weights["w"] = weights["w"][None]
    nodes = [helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["p"], "linear")]
    if draw(st.booleans()):
        wide = left and len(free) > 1
        bias = draw(st.sampled_from([(1,), (outer_size, 1) if wide else (outer_size,)]))
        weights["b"] = rng.standard_normal(bias)
        nodes.append(helper.make_node("Add", draw(st.sampled_from([["p", "b"], ["b", "p"]])), ["y"], "add"))
    else:
        nodes.append(helper.make_node("Relu", ["p"], ["y"], "act"))
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    rank = len(free) - (1 if left and len(free) == 1 else 0)
    model = model_of(nodes, {"x": free}, {"y": [None] * max(rank, len(free))}, weights)
    return model, {"x": rng.standard_normal(free).astype(np.float32)}


@settings(max_examples=150)
@given(matmuls(), st.sampled_from([dense, outer]))
def test_matmul(case: tuple[onnx.ModelProto, dict[str, Any]], maker: Maker) -> None:
    check(*case, {"MatMul": 1}, maker, len(maker(Stage(np.eye(2), None))))


@settings(max_examples=60)
@given(st.one_of(convolutions(), transposed_convolutions()))
def test_the_stage_means_what_the_node_does(case: tuple[onnx.ModelProto, dict[str, Any]]) -> None:
    model, feeds = case
    (site,) = OnnxGraph.from_model(model, {"x": feeds["x"].shape}).sites().sites
    (reference,) = run(model, feeds)
    assert site.input_shape == feeds["x"].shape
    assert site.output_shape == reference.shape
    assert relative_l2(apply_chain(dense(site.stage), feeds["x"]), reference) < BOUND


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_the_models_own_type_is_kept(op: str, dtype: int) -> None:
    rng = np.random.default_rng(0)
    array = helper.tensor_dtype_to_np_dtype(dtype)
    shape = (4, 4, 3) if op.startswith("Conv") else (4, 4)
    data = rng.standard_normal((2, 4, 8) if op.startswith("Conv") else (2, 4)).astype(array)
    node = helper.make_node(op, ["x", "w"], ["y"], "layer")
    weights = {"w": rng.standard_normal(shape).astype(array)}
    model = model_of([node], {"x": list(data.shape)}, {"y": [None] * data.ndim}, weights, dtype=dtype)
    graph = OnnxGraph.from_model(model)
    (site,) = graph.sites().sites
    assert site.stage.weight.dtype == (np.float32 if dtype == TensorProto.FLOAT16 else np.float64)
    graph.replace(site, outer(site.stage))
    assert {t.data_type for t in graph.model().graph.initializer} == {dtype}
    # onnxruntime has no double convolution: ONNX's own evaluator is the reference here.
    (reference,) = ReferenceEvaluator(model).run(None, {"x": data})
    (value,) = ReferenceEvaluator(graph.model()).run(None, {"x": data})
    # Rounding of two factors and of the value between them, each within one unit in the last place of the type.
    assert value.dtype == array
    assert relative_l2(value, reference) < 8 * np.finfo(array).eps
