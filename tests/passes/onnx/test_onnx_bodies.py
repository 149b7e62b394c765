"""Layers in the bodies of If, Loop and Scan, and in functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from passes.core.reference import relative_l2
from passes.onnx_graph import OnnxGraph
from tests.passes.onnx.exact import model_of, outer, run

RNG = np.random.default_rng(11)
F = TensorProto.FLOAT


def matrix(rows: int, columns: int) -> Any:
    return RNG.standard_normal((rows, columns)).astype(np.float32)


def info(name: str, shape: list[Any] | None, dtype: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def branch(name: str, weight: Any, tail: str) -> onnx.GraphProto:
    """x @ weight -> tail; both branches use the same tensor names, as exporters do."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "fc"), helper.make_node(tail, ["h"], ["out"])]
    return helper.make_graph(nodes, name, [], [info("out", None)], [numpy_helper.from_array(weight, "w")])


def conditional() -> onnx.ModelProto:
    node = helper.make_node(
        "If",
        ["flag"],
        ["y"],
        "choose",
        then_branch=branch("t", matrix(4, 6), "Relu"),
        else_branch=branch("e", matrix(4, 6), "Tanh"),
    )
    model = model_of([node], {"x": ["N", 4]}, {"y": ["N", 6]}, {})
    model.graph.input.append(info("flag", [], TensorProto.BOOL))
    return model


def test_both_branches_of_an_if_are_rewritten() -> None:
    model = conditional()
    graph = OnnxGraph.from_model(model)
    sites = graph.sites().sites
    assert [site.name for site in sites] == ["choose/else_branch/fc", "choose/then_branch/fc"]
    assert all(site.in_body for site in sites)
    assert [site.input_shape for site in sites] == [(1, 4), (1, 4)]
    twin = graph.clone()
    for site in sites:
        graph.replace(site, outer(site.stage))
    graph.check()
    x = matrix(3, 4)
    for flag in (True, False):
        feeds = {"x": x, "flag": np.asarray(flag)}
        (reference,) = run(model, feeds)
        assert relative_l2(graph.run(feeds)[0], reference) < 1e-5
        assert relative_l2(twin.run(feeds)[0], reference) == 0
    assert [len(a.g.initializer) for a in graph.model().graph.node[0].attribute] == [2, 2]
    assert [site.name for site in OnnxGraph.from_model(graph.model()).sites().sites] == [
        f"choose/{side}/fc/outer_{i}" for side in ("else_branch", "then_branch") for i in (0, 1)
    ]


def loop(weights: dict[str, Any]) -> onnx.ModelProto:
    """x -> x @ w, repeated; the weight lies outside the body and is captured."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"], "step"),
            helper.make_node("Identity", ["go"], ["on"], "keep"),
        ],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("state", None)],
        [info("on", [], TensorProto.BOOL), info("next", None)],
    )
    node = helper.make_node("Loop", ["trips", "", "x"], ["y"], "repeat", body=body)
    model = model_of([node], {"x": [3, 4]}, {"y": [3, 4]}, {"trips": np.asarray(3, np.int64), **weights})
    return model


def test_a_captured_weight_in_a_loop() -> None:
    model = loop({"w": matrix(4, 4)})
    graph = OnnxGraph.from_model(model)
    (site,) = graph.sites().sites
    assert (site.name, site.input_shape, site.in_body) == ("repeat/body/step", (3, 4), True)
    graph.replace(site, outer(site.stage))
    graph.check()
    after = graph.model()
    assert [t.name for t in after.graph.initializer] == ["trips"], "the captured weight went with its last reader"
    feeds = {"x": matrix(3, 4)}
    assert relative_l2(run(after, feeds)[0], run(model, feeds)[0]) < 1e-5
    assert [op.name for op in graph.workload()][:2] == ["repeat", "repeat/body/step/outer_0"]


def test_identities_in_bodies_stay_where_they_carry_an_output() -> None:
    graph = OnnxGraph.from_model(loop({"w": matrix(4, 4)}))
    assert graph.drop_identities() == ()
    graph.check()


def test_dead_code_in_a_body_and_its_captured_weight() -> None:
    model = loop({"w": matrix(4, 4), "spare": matrix(4, 9)})
    body = model.graph.node[0].attribute[0].g
    body.node.insert(0, helper.make_node("MatMul", ["state", "spare"], ["unused"], "idle"))
    graph = OnnxGraph.from_model(model)
    notes = graph.drop_dead_code()
    assert [note.node for note in notes] == ["repeat/body/idle", "spare"]
    graph.check()
    feeds = {"x": matrix(3, 4)}
    assert relative_l2(graph.run(feeds)[0], run(model, feeds)[0]) == 0


def test_scan_and_functions_are_kept_with_the_reason() -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["row", "w"], ["h"], "inside"),
            helper.make_node("Add", ["state", "row"], ["sum"]),
        ],
        "body",
        [info("state", [4]), info("row", [4])],
        [info("sum", [4]), info("h", [6])],
    )
    nodes = [
        helper.make_node("Scan", ["zero", "x"], ["end", "y"], "scan", body=body, num_scan_inputs=1),
        helper.make_node("Layer", ["x"], ["z"], "call", domain="local"),
    ]
    weights = {"w": matrix(4, 6), "zero": np.zeros(4, np.float32)}
    model = model_of(nodes, {"x": [3, 4]}, {"y": [3, 6], "z": [3, 2]}, weights)
    constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(matrix(4, 2)))
    call = helper.make_node("MatMul", ["a", "v"], ["b"], "within")
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "Layer", ["a"], ["b"], [constant, call], opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    graph = OnnxGraph.from_model(model)
    scan = graph.sites()
    assert scan.sites == ()
    assert [(note.node, note.reason) for note in scan.kept] == [
        ("scan/body/inside", "it stands in the body of a Scan"),
        ("local::Layer/within", "it stands in a function"),
    ]
    assert graph.model() == model
    feeds = {"x": matrix(3, 4)}
    for value, reference in zip(graph.run(feeds), run(model, feeds), strict=True):
        assert relative_l2(value, reference) < 1e-6


def test_a_network_that_cannot_run_is_noted_and_what_has_no_shape_is_kept() -> None:
    nodes = [
        helper.make_node("Conv", ["z", "k"], ["c"], "conv"),
        helper.make_node("Reshape", ["c", "dims"], ["x"], "reshape"),  # to (1, 1): the guess at "dims" does not fit
        helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
    ]
    weights = {"k": matrix(4, 4)[:, :, None], "w": matrix(4, 6)}
    model = model_of(nodes, {"z": ["N", 4, 2]}, {"y": ["N", 6]}, weights)
    model.graph.input.append(info("dims", [2], TensorProto.INT64))
    graph = OnnxGraph.from_model(model)
    scan = graph.sites()
    assert [site.name for site in scan.sites] == ["conv"]
    assert [(note.node, note.reason) for note in scan.kept] == [("fc", "the shape of its input is unknown")]
    assert graph.notes[-1].reason.startswith("the network could not be run to observe shapes: ")


def test_shapes_that_only_a_run_tells_are_found_in_bodies() -> None:
    """The branch reshapes what it captures by a computed shape: inference stops there, a run does not."""
    model = conditional()
    for attribute in model.graph.node[0].attribute:
        nodes = attribute.g.node
        nodes.insert(0, helper.make_node("Reshape", ["x", "dims"], ["r"], "reshape"))
        nodes.insert(0, helper.make_node("Abs", ["four"], ["dims"], "abs"))
        nodes[2].input[0] = "r"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([1, -4], np.int64), "four"))
    graph = OnnxGraph.from_model(model)
    assert [site.input_shape for site in graph.sites().sites] == [(1, 4), (1, 4)]
    assert graph.notes[1:] == ()
