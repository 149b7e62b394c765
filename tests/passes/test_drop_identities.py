from __future__ import annotations

import numpy as np

from passes.drop_identities import DropIdentities
from passes.onnx_graph import OnnxGraph
from tests.onnx_models import normal, onnx_model
from tests.pass_harness import check_pass

IMAGE = {"x": normal(2, 4, 6, 6, seed=7)}


def test_nodes_that_pass_their_input_on_go() -> None:
    body = """net (float[2,4,6,6] x) => (float[2,4,6,6] y) {
        a = Identity (x)
        b = Conv (a, w)
        c = Dropout (b)
        d = Cast <to = 1> (c)
        e = Relu (d)
        y = Identity (e)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(4, 4, 1, 1)}))
    before = {"Identity": 2, "Conv": 1, "Dropout": 1, "Cast": 1, "Relu": 1}
    result = check_pass(DropIdentities(), graph, IMAGE, before=before, after={"Conv": 1, "Relu": 1}, tolerance=0.0)
    assert sorted(note.op for note in result.notes) == ["Cast", "Dropout", "Identity", "Identity"]
    assert [spec.name for spec in graph.outputs] == ["y"]


def test_an_identity_between_input_and_output_stays() -> None:
    graph = OnnxGraph.from_model(onnx_model("net (float[2,3] x) => (float[2,3] y) { y = Identity (x) }", {}))
    counts = {"Identity": 1}
    check_pass(DropIdentities(), graph, {"x": normal(2, 3)}, before=counts, after=counts, tolerance=0.0)


def test_a_cast_that_rounds_stays() -> None:
    body = """net (float[2,3] x) => (float[2,3] y) {
        h = Cast <to = 10> (x)
        y = Cast <to = 1> (h)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {}))
    x = np.float32([[1.0, 1.0 + 2**-20, 3.0]] * 2)  # the second value is no float16
    counts = {"Cast": 2}
    check_pass(DropIdentities(), graph, {"x": x}, before=counts, after=counts, tolerance=0.0)
    np.testing.assert_array_equal(graph.run({"x": x})[0], np.float32([[1, 1, 3]] * 2))
