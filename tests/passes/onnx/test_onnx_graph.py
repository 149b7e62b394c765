"""The rest of the Graph contract: folding, merging, cleanup, metadata, listing, clones, running."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.core.reference import relative_l2
from passes.core.site import Chain, Geometry, Stage, compose
from passes.errors import InputError, UnsupportedError, UsageError, VerificationError
from passes.onnx_graph import OnnxGraph
from tests.passes.onnx.exact import model_of, outer, run

RNG = np.random.default_rng(5)


def array(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def chain_model(*tail: Any, weights: dict[str, Any] | None = None, last: str = "y", opset: int = 17) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["h"], "conv", pads=[1, 1, 1, 1]), *tail]
    stored = {"w": array(5, 3, 3, 3), "b": array(5), **(weights or {})}
    return model_of(nodes, {"x": ["N", 3, 8, 8]}, {last: ["N", 5, 8, 8]}, stored, opset)


FEEDS = {"x": array(2, 3, 8, 8)}


def fold_all(graph: OnnxGraph) -> list[str]:
    folded = []
    while graph.affines():
        affine = graph.affines()[0]
        graph.fold(affine, affine.site.stage.affine(affine.scale, affine.shift))
        folded.append(affine.op)
    return folded


def test_batchnorm_and_constant_arithmetic_fold_into_the_layer() -> None:
    stats = {"g": array(5), "o": array(5), "m": array(5), "v": np.abs(array(5)) + 0.5}
    wide = {"k": array(5, 1, 1), "s": array(1), "d": np.abs(array(1, 5, 1, 1)) + 1, "c": array(5, 1, 1)}
    model = chain_model(
        helper.make_node("BatchNormalization", ["h", "g", "o", "m", "v"], ["n"], "bn", epsilon=1e-3),
        helper.make_node("Mul", ["k", "n"], ["p"], "mul"),
        helper.make_node("Add", ["p", "s"], ["q"], "add"),
        helper.make_node("Div", ["q", "d"], ["r"], "div"),
        helper.make_node("Sub", ["c", "r"], ["y"], "sub"),
        weights=stats | wide,
    )
    graph = OnnxGraph.from_model(model)
    assert fold_all(graph) == ["BatchNormalization", "Mul", "Add", "Div", "Sub"]
    assert [(n.name, n.op_type) for n in graph.model().graph.node] == [("conv", "Conv")]
    assert len(graph.model().graph.initializer) == 2
    graph.check()
    assert relative_l2(graph.run(FEEDS)[0], run(model, FEEDS)[0]) < 1e-5


@pytest.mark.parametrize("reason", ["training", "second reader", "output", "not per channel", "division by it"])
def test_what_is_no_affine_stays(reason: str) -> None:
    stats = {"g": array(5), "o": array(5), "m": array(5), "v": np.abs(array(5)) + 0.5}
    norm = helper.make_node("BatchNormalization", ["h", "g", "o", "m", "v"], ["y"], "bn")
    if reason == "training":
        norm.output.extend(["rm", "rv"])
        norm.attribute.append(helper.make_attribute("training_mode", 1))
    model = chain_model(norm, weights=stats)
    if reason == "second reader":
        model = chain_model(norm, helper.make_node("Relu", ["h"], ["z"], "relu"), weights=stats)
        model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 5, 8, 8]))
    if reason == "output":
        model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 5, 8, 8]))
    if reason == "not per channel":
        model = chain_model(helper.make_node("Mul", ["h", "k"], ["y"], "mul"), weights={"k": array(8)})
    if reason == "division by it":
        model = chain_model(helper.make_node("Div", ["k", "h"], ["y"], "div"), weights={"k": array(5, 1, 1)})
    graph = OnnxGraph.from_model(model)
    assert len(graph.sites().sites) == 1
    assert graph.affines() == ()


def test_batchnorm_behind_a_matmul_must_share_its_axis() -> None:
    stats = {"g": array(5), "o": array(5), "m": array(5), "v": np.abs(array(5)) + 0.5}
    norm = helper.make_node("BatchNormalization", ["h", "g", "o", "m", "v"], ["y"], "bn")
    for op in ("MatMul", "Gemm"):
        layer = helper.make_node(op, ["x", "w"], ["h"], "fc")
        model = model_of([layer, norm], {"x": [2, 4]}, {"y": [2, 5]}, {"w": array(4, 5), **stats})
        graph = OnnxGraph.from_model(model)
        feeds = {"x": array(2, 4)}
        assert fold_all(graph) == ["BatchNormalization"]
        assert relative_l2(graph.run(feeds)[0], run(model, feeds)[0]) < 1e-5
        assert len(graph.sites().sites) == 1
    layer = helper.make_node("MatMul", ["x", "w"], ["h"], "fc")
    model = model_of([layer, norm], {"x": [2, 5, 4]}, {"y": [2, 5, 5]}, {"w": array(4, 5), **stats})
    assert OnnxGraph.from_model(model).affines() == (), "axis 1 is not where MatMul writes its channels"


def test_adjacent_layers_merge() -> None:
    point = helper.make_node("Conv", ["h", "p"], ["y"], "point")
    model = chain_model(point, weights={"p": array(5, 5, 1, 1)})
    graph = OnnxGraph.from_model(model)
    ((first, second),) = graph.adjacent()
    assert (first.name, second.name) == ("conv", "point")
    weight = compose((first.stage, second.stage))[0].astype(np.float32)
    assert first.stage.bias is not None
    bias = second.stage.weight[:, :, 0, 0] @ first.stage.bias
    graph.merge(first, second, Stage(weight, bias, first.stage.geometry))
    assert [n.name for n in graph.model().graph.node] == ["conv+point"]
    assert graph.adjacent() == ()
    graph.check()
    assert relative_l2(graph.run(FEEDS)[0], run(model, FEEDS)[0]) < 1e-5
    with pytest.raises(KeyError, match="replaced before"):
        graph.replace(first, Chain((first.stage,)))


def test_layers_with_something_between_are_not_adjacent() -> None:
    relu = [helper.make_node("Relu", ["h"], ["r"], "relu"), helper.make_node("Conv", ["r", "p"], ["y"], "point")]
    assert OnnxGraph.from_model(chain_model(*relu, weights={"p": array(5, 5, 1, 1)})).adjacent() == ()
    left = helper.make_node("MatMul", ["v", "h"], ["y"], "left")
    right = helper.make_node("MatMul", ["x", "w"], ["h"], "right")
    model = model_of([right, left], {"x": [4, 4]}, {"y": [4, 4]}, {"w": array(4, 4), "v": array(4, 4)})
    assert OnnxGraph.from_model(model).adjacent() == ()


def test_identities_go_and_outputs_keep_their_names() -> None:
    model = chain_model(
        helper.make_node("Identity", ["h"], ["i"], "identity"),
        helper.make_node("Dropout", ["i", "ratio"], ["d", "mask"], "dropout"),
        helper.make_node("Cast", ["d"], ["c"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["c"], ["t"], "transpose", perm=[0, 1, 2, 3]),
        helper.make_node("Relu", ["t"], ["r"], "relu"),
        helper.make_node("Identity", ["r"], ["y"], "last"),
        weights={"ratio": np.asarray(0.5, np.float32)},
    )
    graph = OnnxGraph.from_model(model)
    notes = graph.drop_identities()
    assert [note.node for note in notes] == ["identity", "dropout", "cast", "transpose", "last"]
    after = graph.model()
    assert [(n.op_type, list(n.output)) for n in after.graph.node] == [("Conv", ["h"]), ("Relu", ["y"])]
    assert after.graph.output == model.graph.output
    assert [t.name for t in after.graph.initializer] == ["w", "b"]
    graph.check()
    np.testing.assert_array_equal(run(graph.model(), FEEDS)[0], run(model, FEEDS)[0])
    assert graph.drop_identities() == ()


def test_identities_between_an_input_or_two_outputs_stay() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["y"], "copy"),
        helper.make_node("Relu", ["x"], ["z"], "relu"),
        helper.make_node("Identity", ["z"], ["u"], "twice"),
        helper.make_node("Cast", ["x"], ["d"], "widen", to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["d"], ["v"], "narrow", to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"x": [2]}, {name: [2] for name in "yzuv"}, {})
    graph = OnnxGraph.from_model(model)
    assert graph.drop_identities() == ()
    assert graph.model() == model


def test_dead_code_goes() -> None:
    model = chain_model(
        helper.make_node("Relu", ["h"], ["y"], "relu"),
        helper.make_node("Conv", ["x", "spare"], ["s"], "idle"),
        helper.make_node("Tanh", ["s"], ["t"], "idle tail"),
        weights={"spare": array(2, 3, 1, 1), "nobody": array(3)},
    )
    graph = OnnxGraph.from_model(model)
    assert [note.node for note in graph.drop_dead_code()] == ["idle tail", "idle", "spare", "nobody"]
    graph.check()
    assert graph.drop_dead_code() == ()
    np.testing.assert_array_equal(run(graph.model(), FEEDS)[0], run(model, FEEDS)[0])


def documented() -> onnx.ModelProto:
    model = chain_model(helper.make_node("Relu", ["h"], ["y"], "relu"), opset=21)
    model.ir_version = 10
    model.producer_name, model.producer_version, model.domain, model.model_version = "maker", "1.2", "org.x", 7
    model.doc_string = "a model"
    model.metadata_props.add(key="license", value="CC0")
    graph = model.graph
    graph.doc_string = "a graph"
    graph.metadata_props.add(key="graph", value="meta")
    graph.input[0].doc_string = "an image"
    graph.output[0].metadata_props.add(key="out", value="meta")
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 5, 8, 8]))
    graph.node[0].doc_string = "the layer"
    graph.node[0].metadata_props.add(key="layer", value="meta")
    graph.node[1].doc_string = "the activation"
    graph.initializer[0].doc_string = "a weight"
    note = graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    model.functions.append(
        helper.make_function(
            "com.example", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], model.opset_import[:1]
        )
    )
    return model


def test_untouched_networks_are_written_as_they_were() -> None:
    model = documented()
    graph = OnnxGraph.from_model(model)
    assert graph.model() == model
    assert graph.clone().model() == model


def test_documentation_survives_a_replacement() -> None:
    model = documented()
    graph = OnnxGraph.from_model(model)
    (site,) = graph.sites().sites
    graph.replace(site, outer(site.stage))
    after = graph.model()
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "metadata_props"):
        assert getattr(after, field) == getattr(model, field)
    for field in ("functions", "opset_import", "ir_version"):
        assert getattr(after, field) == getattr(model, field)
    for field in ("doc_string", "metadata_props", "input", "output", "value_info", "quantization_annotation"):
        assert getattr(after.graph, field) == getattr(model.graph, field)
    first, last, relu = after.graph.node
    assert (first.doc_string, list(first.metadata_props)) == ("", [])
    assert (last.doc_string, last.metadata_props[0].value) == ("the layer", "meta")
    assert relu == model.graph.node[1]


def test_unknown_operators_and_attributes_pass_through() -> None:
    odd = helper.make_node("Mystery", ["h"], ["m"], "odd", domain="com.example", level=3)
    odd.attribute.append(helper.make_attribute("blob", b"\xff\x00binary"))
    odd.attribute.append(helper.make_attribute("tensors", [numpy_helper.from_array(array(2), "t")]))
    body = helper.make_graph([helper.make_node("Relu", ["h"], ["inner"])], "g", [], [])
    odd.attribute.append(helper.make_attribute("graphs", [body]))
    odd.attribute.append(helper.make_attribute("kind", helper.make_tensor_type_proto(TensorProto.FLOAT, [2])))
    model = chain_model(odd, helper.make_node("Relu", ["m"], ["y"], "relu"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    graph = OnnxGraph.from_model(model)
    assert graph.model() == model
    (site,) = graph.sites().sites
    graph.replace(site, outer(site.stage))
    assert graph.model().graph.node[2] == odd
    graph.check()
    with pytest.raises(UnsupportedError, match="onnxruntime cannot load the network"):
        graph.run(FEEDS)


def test_odd_but_valid_graphs_pass_through() -> None:
    """A constant and an input among the outputs, nodes without names, an operand read twice, inputs left out."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "h"], ["s"]),
        helper.make_node("Clip", ["s", "", "top"], ["y"]),
    ]
    model = model_of(nodes, {"x": [2, 3]}, {"y": [2, 3]}, {"w": array(3, 3), "top": np.asarray(9, np.float32)})
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 3]))
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]))
    graph = OnnxGraph.from_model(model)
    assert graph.clone().model() == graph.model() == model
    (site,) = graph.sites().sites
    assert site.name == "MatMul:h"
    graph.replace(site, outer(site.stage))
    assert graph.drop_identities() == graph.drop_dead_code() == ()
    graph.check()
    feeds = {"x": array(2, 3)}
    for value, reference in zip(graph.run(feeds), run(model, feeds), strict=True):
        assert relative_l2(value, reference) < 1e-5


def test_layers_that_are_no_sites_are_priced_too() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "dequantize"),
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", auto_pad="SAME_LOWER", strides=[2, 2]),
        helper.make_node("Flatten", ["c"], ["f"], "flatten", axis=2),
        helper.make_node("LSTM", ["f3", "lw", "lr"], ["o", "", ""], "lstm", hidden_size=4, direction="bidirectional"),
        helper.make_node("Unsqueeze", ["f", "one"], ["f3"], "unsqueeze"),
    ]
    nodes[3], nodes[4] = nodes[4], nodes[3]
    weights = {"q": np.ones((5, 3, 3, 3), np.int8), "s": np.asarray(0.1, np.float32), "one": np.asarray([1], np.int64)}
    weights |= {"lw": array(2, 16, 16), "lr": array(2, 16, 4)}
    model = model_of(nodes, {"x": [1, 3, 7, 8]}, {"o": [5, 2, 1, 4]}, weights)
    graph = OnnxGraph.from_model(model)
    macs = {op.name: op.stage.macs for op in graph.workload() if op.stage is not None}
    # conv: 4 x 4 outputs, 5 x 27 weights; LSTM: 5 steps, 2 directions, 4 gates of 4, 16 inputs and 4 states
    assert macs == {"conv": 16 * 5 * 27, "lstm": 5 * 2 * 16 * (16 + 4)}


def test_equal_networks_have_equal_listings() -> None:
    model = documented()
    one, two = OnnxGraph.from_model(model), OnnxGraph.from_model(model)
    assert one.to_text() == two.to_text() == one.clone().to_text()
    assert "conv: h = Conv(x, w, b) {pads=[1, 1, 1, 1]}" in one.to_text()
    changed = numpy_helper.to_array(model.graph.initializer[0]).copy()
    changed.flat[7] = np.nextafter(changed.flat[7], np.float32(2))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, "w"))
    assert OnnxGraph.from_model(model).to_text() != one.to_text()


def test_clones_are_independent() -> None:
    graph = OnnxGraph.from_model(documented())
    text = graph.to_text()
    copy = graph.clone()
    (site,) = copy.sites().sites
    copy.replace(site, outer(site.stage))
    copy.drop_dead_code()
    assert graph.to_text() == text != copy.to_text()
    (original,) = graph.sites().sites
    graph.replace(original, outer(original.stage))
    assert graph.to_text() == copy.to_text()


def test_check_finds_what_a_rewrite_broke() -> None:
    graph = OnnxGraph.from_model(documented())
    (site,) = graph.sites().sites
    graph.check()
    narrow = Stage(site.stage.weight[:3], None, site.stage.geometry)
    graph.replace(site, Chain((narrow,)))
    with pytest.raises(VerificationError, match="not valid ONNX"):
        graph.check()


def test_grouped_linear_stages_become_block_diagonal() -> None:
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")], {"x": [3, 4]}, {"y": [3, 6]}, {"w": array(4, 6)}
    )
    graph = OnnxGraph.from_model(model)
    (site,) = graph.sites().sites
    blocks = array(6, 2)
    graph.replace(site, Chain((Stage(blocks, None, Geometry(groups=2)),)))
    x = array(3, 4)
    expected = np.concatenate([x[:, :2] @ blocks[:3].T, x[:, 2:] @ blocks[3:].T], axis=1)
    assert relative_l2(graph.run({"x": x})[0], expected) < 1e-6


@pytest.mark.parametrize("left", [False, True])
def test_a_matmul_stage_with_a_bias_becomes_matmul_and_add(left: bool) -> None:
    layer = helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"], "fc")
    weight = array(6, 4) if left else array(4, 6)
    x = array(2, 4, 3) if left else array(2, 3, 4)
    shape = [2, 6, 3] if left else [2, 3, 6]
    graph = OnnxGraph.from_model(model_of([layer], {"x": list(x.shape)}, {"y": shape}, {"w": weight}))
    (site,) = graph.sites().sites
    first, second = array(3, 4), array(6, 3)
    inner_bias, bias = array(3), array(6)
    graph.replace(site, Chain((Stage(first, inner_bias), Stage(second, bias)), "pair", (3,)))
    graph.check()
    nodes = [(n.name, n.op_type) for n in graph.model().graph.node]
    assert nodes[:2] == [("fc/pair_0", "MatMul"), ("fc/pair_0/bias_add", "Add")]
    rows = np.moveaxis(x, -2, -1) if left else x
    expected = (rows @ first.T + inner_bias) @ second.T + bias
    expected = np.moveaxis(expected, -2, -1) if left else expected
    assert relative_l2(graph.run({"x": x})[0], expected) < 1e-6
    assert [op.op for op in graph.workload()] == ["MatMul", "Add", "MatMul", "Add"]
    assert graph.affines() == (), "a folded Add would be written as an Add again"


def test_bad_feeds_and_shapes_are_one_line() -> None:
    graph = OnnxGraph.from_model(chain_model(helper.make_node("Relu", ["h"], ["y"], "relu")))
    for feeds in ({}, {"z": FEEDS["x"]}, {"x": array(1, 4, 8, 8)}, {"x": FEEDS["x"].astype(np.float64)}):
        with pytest.raises(InputError, match=r"expected x float32\['N', 3, 8, 8\]") as caught:
            graph.run(feeds)
        assert "\n" not in str(caught.value)
    model = chain_model(helper.make_node("Relu", ["h"], ["y"], "relu"))
    for shapes in ({"q": (1,)}, {"x": (1, 3, 8)}, {"x": (1, 4, 8, 8)}, {"x": (0, 3, 8, 8)}):
        with pytest.raises(UsageError):
            OnnxGraph.from_model(model, shapes)
