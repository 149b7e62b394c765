from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from passes.core.site import Chain
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Epilogue, Stepper, Stop, finish, reads
from passes.torch_apply import run_chain
from tests.onnx_models import batchnorm_weights, normal, onnx_model

Array = NDArray[Any]

RESIDUAL = """net (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    ra = Relu (a)
    b = Conv <pads = [1,1,1,1]> (ra, w1)
    c = Conv <pads = [1,1,1,1]> (b, w2)
    s = Add (c, ra)
    rs = Clip (s, zero, six)
    d = Conv <strides = [2,2]> (rs, w3)
    e = Conv <pads = [1,1,1,1], strides = [2,2]> (rs, w4, b0)
    t = Add (d, e)
    rt = Relu (t)
    p = GlobalAveragePool (rt)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w5, b5)
}"""
RESIDUAL_WEIGHTS = {
    "w0": normal(4, 3, 3, 3),
    "b0": normal(4),
    "w1": normal(4, 4, 3, 3),
    "w2": normal(4, 4, 3, 3),
    "w3": normal(4, 4, 1, 1),
    "w4": normal(4, 4, 3, 3),
    "w5": normal(5, 4),
    "b5": normal(5),
    "zero": np.float32(0),
    "six": np.float32(6),
}


def network(body: str, weights: dict[str, Any], opset: int = 17) -> tuple[OnnxGraph, Stepper]:
    arrays = {name: np.asarray(value, getattr(value, "dtype", np.float32)) for name, value in weights.items()}
    graph = OnnxGraph.from_model(onnx_model(body, arrays, opset))
    return graph, Stepper(graph.model(), graph.sites().sites)


def dense(stop: Stop) -> torch.Tensor:
    return run_chain(stop.site, Chain((stop.site.stage,)), stop.input)


def check_walk(graph: OnnxGraph, stepper: Stepper, feeds: dict[str, Array]) -> list[str]:
    """Walks with the layers as they are, compares with onnxruntime, and returns the order of the stops."""
    order: list[str] = []

    def at_site(stop: Stop) -> torch.Tensor:
        order.append(stop.site.output)
        return dense(stop)

    found = stepper.run(feeds, at_site)
    assert list(found) == [o.name for o in graph.outputs]
    for value, wanted in zip(found.values(), graph.run(feeds), strict=True):
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max() + 1e-6)
    return order


def test_a_residual_network_is_walked_site_by_site() -> None:
    graph, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    order = check_walk(graph, stepper, {"x": normal(3, 3, 8, 8, seed=1)})
    assert sorted(order) == sorted(stepper.sites) and len(order) == 6
    assert stepper.cut == set()


def test_what_is_put_in_place_of_a_layer_reaches_the_output() -> None:
    graph, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    x = normal(2, 3, 8, 8, seed=1)
    found = stepper.run({"x": x}, lambda stop: 2 * dense(stop) if stop.site.output == "y" else dense(stop))
    np.testing.assert_allclose(found["y"].numpy(), 2 * graph.run({"x": x})[0], rtol=1e-4, atol=1e-4)


def test_a_stop_shows_the_input_that_the_layer_gets() -> None:
    graph, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    seen: dict[str, torch.Tensor] = {}

    def at_site(stop: Stop) -> torch.Tensor:
        seen[stop.site.output] = stop.input
        return dense(stop)

    x = normal(2, 3, 8, 8, seed=1)
    stepper.run({"x": x}, at_site)
    model = graph.model()
    for site in stepper.sites.values():
        inside = OnnxGraph.from_model(_with_output(model, site.input)).run({"x": x})
        np.testing.assert_allclose(seen[site.output].numpy(), inside[-1], rtol=1e-4, atol=1e-4)


def test_what_a_stop_shows_is_not_written_to() -> None:
    graph, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def at_site(stop: Stop) -> torch.Tensor:
        shown.extend((value, value.clone()) for value in (stop.input, stop.skip) if value is not None)
        return dense(stop)

    x = normal(2, 3, 8, 8, seed=1)
    with torch.no_grad():
        found = stepper.run({"x": x}, at_site)
    assert any(value.shape[1] == 4 for value, _ in shown) and all(torch.equal(*both) for both in shown)
    np.testing.assert_allclose(found["y"].numpy(), graph.run({"x": x})[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_branch_goes_on_with_another_output_and_leaves_the_walk_as_it_was(gradients: bool) -> None:
    graph, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    feeds = {"x": normal(2, 3, 8, 8, seed=1)}
    found: dict[str, torch.Tensor] = {}

    def at_site(stop: Stop) -> torch.Tensor:
        assert stop.branch is not None
        found[stop.site.output] = finish(stop.branch(2 * dense(stop)), dense)["y"]
        return dense(stop)

    with torch.set_grad_enabled(gradients):
        unchanged = stepper.run(feeds, at_site)["y"]
        np.testing.assert_allclose(unchanged.numpy(), graph.run(feeds)[0], rtol=1e-4, atol=1e-4)
        assert found.keys() == stepper.sites.keys()
        for output, one in found.items():
            wanted = stepper.run(feeds, lambda stop, o=output: dense(stop) * (2 if stop.site.output == o else 1))["y"]
            assert torch.equal(one, wanted) and not torch.equal(one, unchanged)


BRANCHED = """
n (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] sum, float[N, 4, 8, 8] double, float[N, 4, 64] flat) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    b = Conv<pads = [1, 1, 1, 1]>(x, w2)
    c = Conv<pads = [1, 1, 1, 1]>(x, w3)
    d = Conv<pads = [1, 1, 1, 1]>(x, w1)
    flat = Reshape(a, shape)
    ra = Relu(a)
    rb = Relu(b)
    ab = Add(ra, rb)
    abc = Add(c, ab)
    sum = Relu(abc)
    double = Add(d, d)
}
"""


def test_a_result_is_written_over_an_input_that_nothing_else_reads() -> None:
    weights = {f"w{i}": normal(4, 3, 3, 3, seed=i) for i in (1, 2, 3)} | {"shape": np.array([0, 4, 64])}
    graph, stepper = network(BRANCHED, weights)
    given: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def at_site(stop: Stop) -> torch.Tensor:
        y = dense(stop)
        given[stop.site.output] = (y, y.clone())
        return y

    x = normal(2, 3, 8, 8, seed=9)
    with torch.no_grad():
        found = stepper.run({"x": x}, at_site)
    for value, wanted in zip(found.values(), graph.run({"x": x}), strict=True):
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=1e-4)
    kept = {name: torch.equal(*both) for name, both in given.items()}
    assert kept == {"a": True, "b": False, "c": False, "d": True}  # a is seen as flat, too, and d is read twice


def test_nothing_is_written_over_where_gradients_are_recorded() -> None:
    weights = {f"w{i}": normal(4, 3, 3, 3, seed=i) for i in (1, 2, 3)} | {"shape": np.array([0, 4, 64])}
    _, stepper = network(BRANCHED, weights)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def at_site(stop: Stop) -> torch.Tensor:
        y = dense(stop)
        given.append((y, y.clone()))
        return y

    stepper.run({"x": torch.from_numpy(normal(2, 3, 8, 8, seed=9)).requires_grad_()}, at_site)
    assert len(given) == 4 and all(torch.equal(*both) for both in given)


def _with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The network with one more output, which comes last: the tensor ``name``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    (info,) = (v for v in [*inferred.input, *inferred.value_info] if v.name == name)
    copy.graph.node.append(helper.make_node("Identity", [name], ["shown"]))
    copy.graph.output.append(onnx.ValueInfoProto(name="shown", type=info.type))
    return copy


class TestEpilogues:
    def test_of_a_residual_network(self) -> None:
        _, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
        assert stepper.epilogues == {
            "a": Epilogue(None, 0.0, None),
            "b": Epilogue(),  # another layer follows
            "c": Epilogue("ra", 0.0, 6.0),
            "d": Epilogue("e", 0.0, None),
            "e": Epilogue("d", 0.0, None),
            "y": Epilogue(),  # the network's output
        }

    def test_the_branch_of_a_sum_is_there_before_the_layer(self) -> None:
        _, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
        skips = {}

        def at_site(stop: Stop) -> torch.Tensor:
            y = dense(stop)
            skips[stop.site.output] = None if stop.skip is None else stop.skip.shape == y.shape
            return y

        stepper.run({"x": normal(2, 3, 8, 8, seed=1)}, at_site)
        # of two layers that meet in a sum, the one that is computed first cannot know the other
        assert skips == {"a": None, "b": None, "c": True, "d": None, "e": True, "y": None}

    def test_the_shorter_branch_is_computed_first_wherever_it_stands_in_the_file(self) -> None:
        body = """net (float[1,3,6,6] x) => (float[1,4,6,6] y) {
            a = Conv <pads = [1,1,1,1]> (x, w0)
            b = Conv <pads = [1,1,1,1]> (a, w1)
            short = Conv (x, w2)
            s = Add (b, short)
            y = Relu (s)
        }"""
        weights = {"w0": normal(4, 3, 3, 3), "w1": normal(4, 4, 3, 3), "w2": normal(4, 3, 1, 1)}
        graph, stepper = network(body, weights)
        order = check_walk(graph, stepper, {"x": normal(1, 3, 6, 6)})
        assert order == ["short", "a", "b"]

    @pytest.mark.parametrize(
        ("tail", "wanted"),
        [
            ("y = Relu (a)", Epilogue(None, 0.0, None)),
            ("y = Clip (a, low, high)", Epilogue(None, -1.0, 6.0)),
            ('y = Clip (a, "", high)', Epilogue(None, None, 6.0)),
            ("y = Clip (a, low)", Epilogue(None, -1.0, None)),
            ("l = Neg (high) y = Clip (a, l, high)", Epilogue()),  # a bound that the network computes
            ("y = Sigmoid (a)", Epilogue()),
            ("k = Relu (x) y = Add (a, k)", Epilogue("k", None, None)),
            ("k = Relu (x) s = Add (k, a) y = Relu (s)", Epilogue("k", 0.0, None)),
            ("k = Relu (x) s = Add (k, a) y = Tanh (s)", Epilogue("k", None, None)),
            ("s = Add (a, high) y = Relu (s)", Epilogue()),  # a bias, not a branch
            ("s = Add (a, a) y = Relu (s)", Epilogue()),
            ("r = Relu (a) y = Add (a, r)", Epilogue()),  # two readers
            ("k = Relu (x) s = Add (a, k) r = Relu (s) y = Add (s, r)", Epilogue("k", None, None)),
        ],
    )
    def test_of_one_layer(self, tail: str, wanted: Epilogue) -> None:
        body = f"""net (float[2,3,4,4] x) => (float[2,3,4,4] y) {{
            a = Conv (x, w)
            {tail}
        }}"""
        weights = {"w": normal(3, 3, 1, 1), "low": np.float32(-1), "high": np.float32(6)}
        graph, stepper = network(body, {k: v for k, v in weights.items() if k == "w" or k in tail})
        assert stepper.epilogues == {"a": wanted}
        check_walk(graph, stepper, {"x": normal(2, 3, 4, 4, seed=2)})

    @pytest.mark.parametrize(
        ("attributes", "wanted"),
        [("min = 0.0, max = 6.0", (0.0, 6.0)), ("max = 6.0", (None, 6.0)), ("min = -1.0", (-1.0, None))],
    )
    def test_of_a_clip_before_opset_11(self, attributes: str, wanted: tuple[float | None, float | None]) -> None:
        body = f"""net (float[2,3,4,4] x) => (float[2,3,4,4] y) {{
            a = Conv (x, w)
            y = Clip <{attributes}> (a)
        }}"""
        _, stepper = network(body, {"w": normal(3, 3, 1, 1)}, opset=9)
        assert stepper.epilogues == {"a": Epilogue(None, *wanted)}

    def test_an_output_of_the_network_is_not_clamped(self) -> None:
        body = """net (float[2,3,4,4] x) => (float[2,3,4,4] a, float[2,3,4,4] y) {
            a = Conv (x, w)
            y = Relu (a)
        }"""
        graph, stepper = network(body, {"w": normal(3, 3, 1, 1)})
        assert stepper.epilogues == {"a": Epilogue()}
        check_walk(graph, stepper, {"x": normal(2, 3, 4, 4)})


def test_an_operator_outside_the_table_runs_in_onnxruntime_and_cuts_the_gradient() -> None:
    body = """net (float[2,3,6,6] x) => (float[2,4,12,12] y) {
        a = Conv (x, w)
        s = Softplus (a)
        y = Resize <mode = "linear", antialias = 1> (s, "", scales)
    }"""
    scales = np.array([1, 1, 2, 2], np.float32)
    graph, stepper = network(body, {"w": normal(4, 3, 1, 1), "scales": scales}, opset=18)
    feeds = {"x": normal(2, 3, 6, 6)}
    check_walk(graph, stepper, feeds)
    assert stepper.cut == {"Softplus", "Resize"}
    x = torch.from_numpy(feeds["x"]).requires_grad_()
    assert not stepper.run({"x": x}, dense)["y"].requires_grad


def test_several_walks_with_batches_of_any_size_use_one_stepper() -> None:
    graph, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    for size in (1, 5, 2):
        check_walk(graph, stepper, {"x": normal(size, 3, 8, 8, seed=size)})
    graph, stepper = network(
        """net (float[N,3] x) => (float[N,4] y) {
            a = MatMul (x, w)
            y = Softplus (a)
        }""",
        {"w": normal(3, 4)},
    )
    for size in (1, 5, 2):  # the one-node session of the fallback is kept, whatever the batch
        check_walk(graph, stepper, {"x": normal(size, 3, seed=size)})


def test_several_outputs_inputs_and_constants_among_them() -> None:
    body = """net (float[2,3] x, float[2,3] z) => (float[2,4] y, float[2,3] s, float[4] k) {
        s = Sub (x, z)
        y = Gemm (s, w, k)
    }"""
    graph, stepper = network(body, {"w": normal(3, 4), "k": normal(4)})
    assert stepper.inputs == ["x", "z"]
    check_walk(graph, stepper, {"x": normal(2, 3), "z": normal(2, 3, seed=1)})


def conditional() -> onnx.ModelProto:
    """y = mean(conv(x)) > 0 ? conv(x) * scale : (conv(x) + shift) with both branches reading from outside."""
    then = helper.make_graph(
        [helper.make_node("Mul", ["a", "scale"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    inner = helper.make_graph(
        [helper.make_node("Add", ["a", "shift"], ["deep"])],
        "inner",
        [],
        [helper.make_tensor_value_info("deep", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("If", ["yes"], ["e"], then_branch=inner, else_branch=inner)],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(True), "yes")],
    )
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=then, else_branch=other),
    ]
    stored = {"w": normal(3, 3, 1, 1), "scale": normal(3, 1, 1), "shift": normal(3, 1, 1), "zero": np.float32(0)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 4, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_bodies_see_the_tensors_around_them() -> None:
    model = conditional()
    assert sorted(set(reads(model.graph.node[-1]))) == ["a", "positive", "scale", "shift"]
    graph = OnnxGraph.from_model(model)
    stepper = Stepper(graph.model(), graph.sites().sites)
    x = normal(1, 3, 4, 4)
    outcomes, site = set(), stepper.sites["a"]
    for value in (x, -x):
        check_walk(graph, stepper, {"x": value})
        a = run_chain(site, Chain((site.stage,)), torch.from_numpy(value))
        a = run_chain(site, Chain((site.stage,)), torch.from_numpy(value))
        outcomes.add(bool(a.mean() > 0))
    assert outcomes == {True, False}  # both branches were taken
    assert stepper.epilogues["a"] == Epilogue()


def test_feeds_of_one_sample_each_are_walked_as_one_batch() -> None:
    fixed = RESIDUAL.replace("float[N,", "float[1,")
    graph, stepper = network(fixed, RESIDUAL_WEIGHTS)
    x = normal(5, 3, 8, 8, seed=3)
    feeds = [{"x": x[i : i + 1]} for i in range(5)]
    shapes, skips = {}, {}

    def at_site(stop: Stop) -> torch.Tensor:
        shapes[stop.site.output] = len(stop.input)
        skips[stop.site.output] = None if stop.skip is None else len(stop.skip)
        return dense(stop)

    found = stepper.run(feeds, at_site)
    assert set(shapes.values()) == {5}
    assert skips == {"a": None, "b": None, "c": 5, "d": None, "e": 5, "y": None}
    wanted = np.concatenate([graph.run(feed)[0] for feed in feeds])
    np.testing.assert_allclose(found["y"].numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_feeds_of_different_sizes_are_walked_side_by_side() -> None:
    graph, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    x = normal(9, 3, 8, 8, seed=3)
    found = stepper.run([{"x": x[:4]}, {"x": x[4:8]}, {"x": x[8:]}], dense)
    np.testing.assert_allclose(found["y"].numpy(), graph.run({"x": x})[0], rtol=1e-4, atol=1e-4)


def test_the_other_side_of_a_product_is_walked_along_its_own_axis() -> None:
    body = """net (float[5,3] x) => (float[4,3] y) {
        a = MatMul (w, x)
        y = Relu (a)
    }"""
    graph, stepper = network(body, {"w": normal(4, 5)})
    assert stepper.sites["a"].channel_axis == -2
    feeds = [{"x": normal(5, 3, seed=s)} for s in range(3)]
    inputs = []

    def at_site(stop: Stop) -> torch.Tensor:
        inputs.append(stop.input.shape)
        return dense(stop)

    found = stepper.run(feeds, at_site)
    assert inputs == [(5, 9)]  # channels stay the first axis: samples are put side by side
    np.testing.assert_allclose(found["y"].numpy(), np.concatenate([graph.run(f)[0] for f in feeds]), rtol=1e-5)


def test_no_feeds_are_no_walk() -> None:
    _, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    with pytest.raises(ValueError, match="empty"):
        stepper.run([], dense)


def test_a_batchnorm_that_was_not_folded_is_walked_through() -> None:
    body = """net (float[N,3,6,6] x) => (float[N,4,2,2] y) {
        a = Conv (x, w)
        n = BatchNormalization (a, gamma, beta, mean, var)
        r = Relu (n)
        y = MaxPool <kernel_shape = [3,3], strides = [2,2], ceil_mode = 0> (r)
    }"""
    graph, stepper = network(body, {"w": normal(4, 3, 1, 1), **batchnorm_weights(4)})
    check_walk(graph, stepper, {"x": normal(3, 3, 6, 6)})
    assert stepper.epilogues["a"] == Epilogue()


def test_gradients_reach_the_input_of_a_covered_network() -> None:
    _, stepper = network(RESIDUAL, RESIDUAL_WEIGHTS)
    x = torch.from_numpy(normal(2, 3, 8, 8, seed=1)).requires_grad_()
    (gradient,) = torch.autograd.grad(stepper.run({"x": x}, dense)["y"].sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("operator", ["MatMulInteger", "QLinearMatMul"])
def test_sums_of_bytes_do_not_saturate_on_the_way(operator: str) -> None:
    """Pairs of products of the largest bytes do not fit into 16 bits."""
    weight = np.full((32, 16), 127, np.int8)
    weight[:, 1::2] = -127
    arrays = {"w": weight, "w0": np.int8(0), "x0": np.uint8(0), "y0": np.uint8(0), "one": np.float32(1)}
    body = {
        "MatMulInteger": "net (uint8[N,32] x) => (int32[N,16] y) { y = MatMulInteger (x, w, x0, w0) }",
        "QLinearMatMul": "net (uint8[N,32] x) => (uint8[N,16] y) "
        "{ y = QLinearMatMul (x, one, x0, w, one, w0, large, y0) }",
    }[operator]
    _, stepper = network(body, {**arrays, "large": np.float32(2**13)})
    x = np.full((3, 32), 255, np.uint8)
    sums = x.astype(np.int64) @ weight
    wanted = sums if operator == "MatMulInteger" else np.clip(np.rint(sums / 2**13), 0, 255)
    np.testing.assert_array_equal(stepper.run({"x": x}, dense)["y"].numpy(), wanted)
