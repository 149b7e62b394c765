from __future__ import annotations

import numpy as np
import pytest

from passes.core.site import Stage
from passes.fold_batchnorm import FoldBatchNorm
from passes.graph import Note
from passes.onnx_graph import OnnxGraph
from tests.onnx_models import batchnorm_weights, normal, onnx_model
from tests.pass_harness import check_pass
from tests.sequential_graph import SequentialGraph, Step

BN = "BatchNormalization"
IMAGE = {"x": normal(2, 4, 6, 6, seed=7)}


@pytest.mark.parametrize(
    ("conv", "shape", "weight"),
    [
        ("Conv <pads = [1,1,1,1]> (x, w)", "2,6,6,6", normal(6, 4, 3, 3)),
        ("Conv <group = 2> (x, w, b)", "2,6,6,6", normal(6, 2, 1, 1)),
        ("ConvTranspose <group = 2, strides = [2,2]> (x, w, b)", "2,6,13,13", normal(4, 3, 3, 3)),
    ],
)
def test_a_batchnorm_behind_a_convolution_is_folded(conv: str, shape: str, weight: np.ndarray) -> None:
    body = f"""net (float[2,4,6,6] x) => (float[{shape}] y) {{
        t = {conv}
        n = BatchNormalization (t, gamma, beta, mean, var)
        y = Relu (n)
    }}"""
    weights = {"w": weight, **batchnorm_weights(6)}
    if ", b)" in conv:
        weights["b"] = normal(6)
    graph = OnnxGraph.from_model(onnx_model(body, weights))
    op = conv.split()[0]
    # float32 weights are rounded once: half an ulp each, against onnxruntime's own rounding of the same size
    check_pass(
        FoldBatchNorm(), graph, IMAGE, before={op: 1, BN: 1, "Relu": 1}, after={op: 1, "Relu": 1}, tolerance=1e-6
    )


def test_a_row_of_affines_is_folded_one_after_another() -> None:
    body = """net (float[2,4,6,6] x) => (float[2,6,6,6] y) {
        t = Conv (x, w)
        n = BatchNormalization (t, gamma, beta, mean, var)
        s = Mul (n, scale)
        y = Add (s, shift)
    }"""
    weights = {"w": normal(6, 4, 1, 1), **batchnorm_weights(6), "scale": normal(6, 1, 1), "shift": normal(1, 6, 1, 1)}
    graph = OnnxGraph.from_model(onnx_model(body, weights))
    before = {"Conv": 1, BN: 1, "Mul": 1, "Add": 1}
    result = check_pass(FoldBatchNorm(), graph, IMAGE, before=before, after={"Conv": 1}, tolerance=1e-6)
    assert len(result.notes) == 3


def test_a_linear_layer_takes_its_scale_and_shift() -> None:
    body = """net (float[5,8] x) => (float[5,3] y) {
        t = Gemm <transB = 1> (x, w, b)
        s = Mul (t, scale)
        y = Add (s, shift)
    }"""
    weights = {"w": normal(3, 8), "b": normal(3), "scale": normal(3, seed=1), "shift": normal(3, seed=2)}
    graph = OnnxGraph.from_model(onnx_model(body, weights))
    feeds = {"x": normal(5, 8, seed=3)}
    check_pass(FoldBatchNorm(), graph, feeds, before={"Gemm": 1, "Mul": 1, "Add": 1}, after={"Gemm": 1}, tolerance=1e-6)


def test_a_scale_alone_brings_no_bias() -> None:
    body = """net (float[2,5,8] x) => (float[2,5,3] y) {
        t = MatMul (x, w)
        y = Mul (t, scale)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(8, 3), "scale": normal(3, seed=1)}))
    feeds = {"x": normal(2, 5, 8, seed=3)}
    check_pass(FoldBatchNorm(), graph, feeds, before={"MatMul": 1, "Mul": 1}, after={"MatMul": 1}, tolerance=1e-6)
    assert graph.sites().sites[0].stage.bias is None


def test_a_batchnorm_that_shares_its_input_stays() -> None:
    body = """net (float[2,4,6,6] x) => (float[2,4,6,6] y) {
        t = Conv (x, w)
        n = BatchNormalization (t, gamma, beta, mean, var)
        y = Add (n, t)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(4, 4, 1, 1), **batchnorm_weights(4)}))
    counts = {"Conv": 1, BN: 1, "Add": 1}
    check_pass(FoldBatchNorm(), graph, IMAGE, before=counts, after=counts, tolerance=0.0)


def test_a_batchnorm_in_training_mode_stays() -> None:
    body = """net (float[2,4,6,6] x) => (float[2,4,6,6] y) {
        t = Conv (x, w)
        y, m, v = BatchNormalization <training_mode = 1> (t, gamma, beta, mean, var)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(4, 4, 1, 1), **batchnorm_weights(4)}))
    assert not FoldBatchNorm().run(graph).modified


def test_a_weight_that_two_layers_share_is_folded_for_one_alone() -> None:
    body = """net (float[2,4,6,6] x) => (float[2,4,6,6] y) {
        t = Conv (x, w)
        n = BatchNormalization (t, gamma, beta, mean, var)
        y = Conv (n, w)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(4, 4, 1, 1), **batchnorm_weights(4)}))
    check_pass(FoldBatchNorm(), graph, IMAGE, before={"Conv": 2, BN: 1}, after={"Conv": 2}, tolerance=1e-6)


def test_a_fold_that_overflows_is_refused_with_the_node_named() -> None:
    stage = Stage(np.full((2, 2), 1e30, np.float32), None)
    affine = Step("bn", "Affine", scale=np.full(2, 1e30), shift=np.zeros(2))
    graph = SequentialGraph([Step("fc", "Layer", stage), affine], (1, 2))
    counts = {"Layer": 1, "Affine": 1}
    result = check_pass(FoldBatchNorm(), graph, {"x": np.ones((1, 2))}, before=counts, after=counts, tolerance=0.0)
    assert result.notes == (Note("bn", "Affine", "kept: folded into fc it overflows"),)
