"""ONNX networks as trainable modules: operator by operator and on real networks, against onnxruntime."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from passes.core.site import Chain, Site, Stage
from passes.drop_dead_code import DropDeadCode
from passes.errors import UnsupportedError, VerificationError
from passes.factorize import Factorize
from passes.fold_batchnorm import FoldBatchNorm
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_module import to_trainable, trained
from passes.training.layers import ChainLayer, StageLayer
from passes.training.network import TrainableNetwork
from tests.onnx_models import batchnorm_weights, normal, onnx_model

MODELS = Path(__file__).parents[4] / "shared" / "models"


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-12))


def outputs(network: TrainableNetwork, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The module's outputs in inference mode; its own mode stays."""
    module = copy.deepcopy(network.module).eval()
    with torch.no_grad():
        found = module(*(torch.from_numpy(feeds[name]) for name in network.inputs))
    return [t.numpy() for t in (found if isinstance(found, tuple) else (found,))]


def step(network: TrainableNetwork, feeds: list[dict[str, NDArray[Any]]], size: float = 1e-3) -> list[str]:
    """One step down the gradient of the squared outputs, in training mode; names of parameters without a gradient."""
    network.module.train()
    batch = [torch.from_numpy(np.concatenate([one[name] for one in feeds])) for name in network.inputs]
    found = network.module(*batch)
    loss = sum((t.float() ** 2).mean() for t in (found if isinstance(found, tuple) else (found,)))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    without = [n for n, p in network.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    with torch.no_grad():
        for p in network.module.parameters():
            if p.grad is not None:
                p -= size * p.grad / (p.grad.norm() + 1e-12) * p.norm()
    network.module.zero_grad()
    return without


@dataclass(frozen=True)
class Case:
    """A node behind a convolution: ``conv(x)`` is its first input, ``rest`` are constants."""

    op: str
    rest: tuple[NDArray[Any] | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    trained: int = 0
    """Constants of the node that are trained."""

    def __str__(self) -> str:
        said = [f"{k}={v}".replace(" ", "") for k, v in self.attributes.items() if not hasattr(v, "dims")]
        return "-".join([f"{self.op}{self.opset}", *said])


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def scalar(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


CHANNELS, HEIGHT, WIDTH = 4, 6, 7
UNARY = ("Relu", "Sigmoid", "Tanh", "Exp", "Abs", "Neg", "Erf", "HardSwish", "Identity", "Softplus", "Softsign", "Sin",
         "Cos", "Elu", "Celu", "Selu", "ThresholdedRelu", "LeakyRelu", "HardSigmoid", "GlobalAveragePool",
         "GlobalMaxPool", "Flatten", "Reciprocal", "Sign", "Floor", "Ceil", "Round")  # fmt: skip

CASES = [
    *(Case(op) for op in UNARY),
    *(Case(op, (normal(CHANNELS, 1, 1),), trained=1) for op in ("Add", "Sub", "Mul")),
    Case("Div", (f32(1.5, 2, -1, 3).reshape(CHANNELS, 1, 1),), trained=1),
    Case("Mul", (scalar(0.5),)),  # a number of the formula
    Case("Add", (normal(1, CHANNELS, HEIGHT, WIDTH),)),  # a table, not per channel
    Case("Pow", (scalar(2.0),)),
    Case("PRelu", (normal(CHANNELS, 1, 1),), trained=1),
    Case("Clip", (scalar(-0.5), scalar(0.25))),
    Case("Clip", (None, scalar(0.25))),
    Case("Clip", (), {"min": -0.1, "max": 0.3}, opset=9),
    Case("BatchNormalization", tuple(batchnorm_weights(CHANNELS).values()), {"epsilon": 0.01}),
    Case("InstanceNormalization", (normal(CHANNELS), normal(CHANNELS, seed=1)), trained=2),
    Case("LayerNormalization", (normal(WIDTH), normal(WIDTH, seed=1)), trained=2),
    Case("GroupNormalization", (normal(CHANNELS), normal(CHANNELS, seed=1)), {"num_groups": 2}, opset=21, trained=2),
    Case("LRN", (), {"size": 3}),
    Case("LpNormalization", (), {"axis": 1}),
    Case("Softmax", (), {"axis": 1}, opset=11),
    Case("Softmax", (), {"axis": -1}),
    Case("LogSoftmax", (), {"axis": 1}),
    Case("MaxPool", (), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", (), {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("MaxPool", (), {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0]}),
    Case("AveragePool", (), {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1]}),
    Case("AveragePool", (), {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", (), {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ReduceMean", (), {"axes": [2, -1]}),
    Case("ReduceMean", (ints(2, 3),), {"keepdims": 0}, opset=18),
    Case("ReduceSum", (ints(-1),), {"keepdims": 0}),
    *(Case(op, (), {"axes": [1, 2]}) for op in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")),
    *(Case(op, (), {"axes": [3]}) for op in ("ReduceSumSquare", "ReduceLogSumExp")),
    Case("Max", (normal(CHANNELS, 1, 1),)),
    Case("Min", (normal(CHANNELS, 1, 1), scalar(0.1))),
    Case("Mean", (normal(CHANNELS, 1, 1),)),
    Case("Transpose", (), {"perm": [0, 2, 3, 1]}),
    Case("Reshape", (ints(0, 2, -1),)),
    Case("Reshape", (ints(-1, CHANNELS * HEIGHT * WIDTH),)),
    Case("Reshape", (ints(1, CHANNELS, HEIGHT * WIDTH),)),  # the batch of the file is written into these four
    Case("Reshape", (ints(1, -1),)),
    Case("Reshape", (ints(2, CHANNELS // 2, HEIGHT * WIDTH),)),
    Case("Reshape", (ints(CHANNELS // 2, 2, HEIGHT * WIDTH),)),
    Case("Unsqueeze", (ints(-1, 1),)),
    Case("Slice", (ints(1, -5), ints(2**63 - 1, -1), ints(2, -1), ints(2, 3))),
    Case("Slice", (), {"starts": [1], "ends": [3], "axes": [1]}, opset=9),
    Case("Pad", (ints(0, 0, 1, 2, 0, 1, 0, 3),)),
    Case("Pad", (ints(1, 2), scalar(0.5), ints(-1)), opset=18),
    Case("Pad", (), {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 2.0}, opset=9),
    Case("Pad", (ints(0, 0, 1, 2, 0, 0, 0, 3),), {"mode": "reflect"}),
    Case("Pad", (ints(0, 0, 1, 2, 0, 0, 0, 3),), {"mode": "edge"}),
    Case("Gather", (ints(2, 0, -3),), {"axis": 1}),
    Case("Expand", (ints(1, 1, 1, WIDTH),)),
    Case("Tile", (ints(1, 2, 1, 1),)),
    Case("DepthToSpace", (), {"blocksize": 2}),
    Case("DepthToSpace", (), {"blocksize": 2, "mode": "CRD"}),
    Case("Resize", (None, f32(1, 1, 2, 2)), {"mode": "linear"}),
    Case("Resize", (None, None, ints(1, CHANNELS, 12, 14)), {"mode": "nearest", "nearest_mode": "floor",
                                                            "coordinate_transformation_mode": "asymmetric"}),
    Case("Cast", (), {"to": TensorProto.DOUBLE}),
    Case("MatMul", (normal(WIDTH, 5),)),  # a site
    Case("MatMul", (normal(CHANNELS, WIDTH, 5),), trained=1),  # a batch of matrices, which is none
    Case("Conv", (normal(6, CHANNELS, 3, 3), normal(6)), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", (normal(CHANNELS, 3, 3, 3), normal(3)), {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    Case("Einsum", (), {"equation": "nchw->nhc"}),
]  # fmt: skip


def model_of(case: Case) -> onnx.ModelProto:
    names = [f"c{n}" if value is not None else "" for n, value in enumerate(case.rest)]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], "stem", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node(case.op, ["h", *names], ["y"], "node", **case.attributes),
    ]
    stored = [numpy_helper.from_array(v, n) for v, n in zip(case.rest, names, strict=True) if v is not None]
    stored += [numpy_helper.from_array(normal(CHANNELS, 3, 3, 3), "w"), numpy_helper.from_array(normal(CHANNELS), "b")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, HEIGHT, WIDTH])
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name="y")], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=8)
    (inferred,) = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.output
    y = inferred.type.tensor_type
    axes = range(len(y.shape.dim) or 4)  # where nothing is inferred, it is the shape of the input
    info = helper.make_tensor_value_info("y", y.elem_type or TensorProto.FLOAT, [f"y{axis}" for axis in axes])
    model.graph.output[0].CopyFrom(info)
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_onnxruntime_computes_and_lets_gradients_through(case: Case) -> None:
    graph = OnnxGraph.from_model(model_of(case))
    network = to_trainable(graph)
    feeds = [{"x": normal(1, 3, HEIGHT, WIDTH, seed=seed)} for seed in (3, 4, 5)]
    found = outputs(network, {"x": np.concatenate([f["x"] for f in feeds])})[0]
    wanted = [graph.run(f)[0] for f in feeds]
    assert found.size == sum(w.size for w in wanted)
    assert relative(found.reshape(-1), np.concatenate(wanted).reshape(-1)) < 1e-4
    assert len(network.constants) == case.trained
    flat = case.op in ("Sign", "Floor", "Ceil", "Round")  # of which the gradient is zero
    without = step(network, feeds)
    assert without == [] or (flat and set(without) == {"stem.weight", "stem.bias"})


def test_numbers_of_one_batch_in_the_file_do_not_bind_the_module() -> None:
    """Shuffled channels as exported at batch 1, where batch and channels are one axis in between."""
    body = """g (float[1,3,6,7] x) => (float[a,b,c,d] y) {
        h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
        p = Reshape(h, apart)  q = Transpose<perm=[1,0,2]>(p)  y = Reshape(q, together)
    }"""
    weights = {"w": normal(4, 3, 3, 3), "apart": ints(2, 2, 42), "together": ints(2, -1, 2, 42)}
    graph = OnnxGraph.from_model(onnx_model(body, weights))
    network = to_trainable(graph)
    feeds = [{"x": normal(1, 3, 6, 7, seed=seed)} for seed in range(3)]
    (found,) = outputs(network, {"x": np.concatenate([f["x"] for f in feeds])})
    assert relative(found, np.concatenate([graph.run(f)[0] for f in feeds], axis=1)) < 1e-5


SIZES = """g (float[N,3,H,W] x) => (float[N,K,C] y) {
    h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    s = Shape(h)  n = Gather<axis=0>(s, zero)  nn = Unsqueeze(n, axis)
    t = Concat<axis=0>(nn, rest)  p = Transpose<perm=[0,2,3,1]>(h)  y = Reshape(p, t)
}"""


def test_sizes_follow_the_input() -> None:
    weights = {"w": normal(4, 3, 3, 3), "zero": np.array(0), "axis": ints(0), "rest": ints(-1, 4)}
    graph = OnnxGraph.from_model(onnx_model(SIZES, weights), {"x": (1, 3, 8, 8)})
    network = to_trainable(graph)
    feeds = {"x": normal(5, 3, 10, 6)}  # of another size than the one that the network was read at
    (found,) = outputs(network, feeds)
    assert found.shape == (5, 60, 4) and relative(found, graph.run(feeds)[0]) < 1e-5


BLOCK = """g (float[N,3,8,8] x) => (float[N,10] y) {
    h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0)
    n = BatchNormalization<epsilon=0.001, momentum=0.8>(h, gamma, beta, mean, var)
    r = Relu(n)
    c = Conv<kernel_shape=[1,1]>(r, w1, b1)
    a = Add(c, r)  m = Mul(a, gain)  p = PRelu(m, slope)
    q = GlobalAveragePool(p)  f = Flatten(q)
    y = Gemm<transB=1>(f, w2, b2)
}"""


def block(**more: NDArray[Any]) -> OnnxGraph:
    weights = {
        "w0": normal(16, 3, 3, 3),
        **batchnorm_weights(16),
        **{"w1": normal(16, 16, 1, 1), "b1": normal(16), "gain": normal(16, 1, 1), "slope": normal(16, 1, 1)},
        **{"w2": normal(10, 16), "b2": normal(10)},
        **more,
    }
    return OnnxGraph.from_model(onnx_model(BLOCK, weights))


def names(graph: OnnxGraph) -> tuple[list[str], set[str]]:
    model = graph.model()
    return [n.name for n in model.graph.node], {t.name for t in model.graph.initializer}


def images(count: int, seed: int = 0) -> list[dict[str, NDArray[Any]]]:
    return [{"x": normal(1, 3, 8, 8, seed=seed + i)} for i in range(count)]


def test_training_goes_back_into_the_file() -> None:
    graph = block()
    before = graph.to_text()
    network = to_trainable(graph)
    assert list(network.layers) == [s.name for s in graph.sites().sites]
    assert sorted(network.constants.values()) == ["gain", "slope"] and list(network.norms.values()) == ["n"]
    assert step(network, images(6), 0.05) == []
    result = trained(graph, network)
    assert graph.to_text() == before != result.to_text()
    assert names(result) == names(graph)
    stored = {t.name: numpy_helper.to_array(t) for t in result.model().graph.initializer}
    norm = network.module.get_submodule(next(iter(network.norms)))
    for name, tensor in (("gamma", norm.weight), ("mean", norm.running_mean), ("var", norm.running_var)):
        np.testing.assert_array_equal(stored[name], tensor.detach().numpy())
    original = {t.name: numpy_helper.to_array(t) for t in graph.model().graph.initializer}
    assert all(not np.array_equal(stored[name], original[name]) for name in stored)
    for feeds in images(2, seed=50):
        assert relative(outputs(network, feeds)[0], result.run(feeds)[0]) < 1e-5
    assert (result.inputs, result.outputs) == (graph.inputs, graph.outputs)


def test_batchnorm_learns_with_the_momentum_of_the_node() -> None:
    """Running mean after one batch: 0.8 of the file's and 0.2 of the batch's, as ONNX writes its momentum."""
    graph = block()
    network = to_trainable(graph)
    seen: list[torch.Tensor] = []
    path = next(iter(network.norms))
    norm = network.module.get_submodule(path)
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.module.train()
    network.module(torch.from_numpy(normal(5, 3, 8, 8)))
    wanted = 0.8 * torch.from_numpy(batchnorm_weights(16)["mean"]) + 0.2 * seen[0].mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, wanted, rtol=1e-5, atol=1e-6)
    assert norm.eps == pytest.approx(1e-3)


def split(site: Site) -> Chain:
    """A chain of full rank: exact, whatever the layer is."""
    out = site.stage.out_channels
    first = Stage(site.stage.weight, None, site.stage.geometry)
    shape = (out, out, *(1,) * site.stage.geometry.ndim)
    geometry = type(site.stage.geometry).pointwise(site.stage.geometry.ndim)
    return Chain((first, Stage(np.eye(out, dtype=np.float32).reshape(shape), site.stage.bias, geometry)), "svd", (out,))


def test_a_rewritten_network_trains_and_goes_back() -> None:
    graph = block()
    chains = {site.name: split(site) for site in graph.sites().sites}
    PassManager([FoldBatchNorm(), DropDeadCode()]).run(graph)
    chains = {site.name: split(site) for site in graph.sites().sites}
    PassManager([Factorize(chains)]).run(graph)
    network = to_trainable(graph)
    assert len(network.layers) == 2 * len(chains)
    assert step(network, images(6)) == []
    result = trained(graph, network)
    assert names(result) == names(graph)
    assert relative(outputs(network, images(1)[0])[0], result.run(images(1)[0])[0]) < 1e-5


def test_a_layer_that_became_a_chain_is_put_in_its_place() -> None:
    graph = block()
    network = to_trainable(graph)
    site = next(s for s in network.sites.values() if s.output == "h")
    network.put(site.name, ChainLayer(split(site), site.channel_axis))
    step(network, images(6))
    result = trained(graph, network)
    added = set(names(result)[0]) - set(names(graph)[0])
    assert added == {f"{site.name}/svd_0", f"{site.name}/svd_1"}
    assert relative(outputs(network, images(1)[0])[0], result.run(images(1)[0])[0]) < 1e-5


def test_a_layer_of_another_kind_is_no_result() -> None:
    graph = block()
    network = to_trainable(graph)
    network.put(next(iter(network.sites)), torch.nn.Identity())
    with pytest.raises(TypeError, match="expected a StageLayer or a ChainLayer"):
        trained(graph, network)


def test_another_network_s_weights_are_noticed() -> None:
    graph = block()
    network = to_trainable(graph)
    network.constants.clear()  # as if the gains had no place in the file
    with torch.no_grad():
        network.module.get_parameter("gain").mul_(2.0)
    with pytest.raises(VerificationError, match="output 'y' in torch differs from onnxruntime's"):
        trained(graph, network)


TIED = """g (float[N,4,6,6] x) => (float[N,4,6,6] y) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)
    r = Relu(a)
    y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r, w, b)
}"""


def test_a_weight_that_two_layers_read_stays_one() -> None:
    graph = OnnxGraph.from_model(onnx_model(TIED, {"w": normal(4, 4, 3, 3), "b": normal(4)}))
    network = to_trainable(graph).clone()
    one, two = (network.layer(name) for name in network.sites)
    assert one.weight is two.weight
    step(network, [{"x": normal(1, 4, 6, 6, seed=s)} for s in range(3)])
    stored = [t for t in trained(graph, network).model().graph.initializer if len(t.dims) == 4]
    assert len(stored) == 1
    np.testing.assert_array_equal(numpy_helper.to_array(stored[0]), one.weight.detach().numpy())


LINEAR = """g (float[N,5,6] x) => (float[N,5,3] y) {
    t = Transpose<perm=[1,0]>(w0)  a = MatMul(x, t)
    b = MatMul(w1, a)
    c = Reshape(b, flat)
    d = Gemm<alpha=0.5, beta=2.0>(c, w2, b2)
    e = Gemm<transB=1>(d, w3, b3)
    y = Reshape(e, shape)
}"""


def test_linear_layers_of_every_spelling_go_back() -> None:
    weights = {
        **{"w0": normal(7, 6), "w1": normal(5, 5), "w2": normal(7, 4), "b2": normal(4), "w3": normal(3, 4)},
        **{"b3": normal(1, 3), "flat": ints(-1, 7), "shape": ints(-1, 5, 3)},
    }
    graph = OnnxGraph.from_model(onnx_model(LINEAR, weights))
    network = to_trainable(graph)
    assert len(network.layers) == 4
    assert step(network, [{"x": normal(1, 5, 6, seed=s)} for s in range(3)], 0.1) == []
    result = trained(graph, network)
    feeds = {"x": normal(2, 5, 6, seed=9)}
    assert relative(outputs(network, feeds)[0], result.run(feeds)[0]) < 1e-5
    ops = [[n.op_type for n in g.model().graph.node] for g in (graph, result)]
    assert ops[1] == ops[0][1:]  # the Transpose of a weight goes, which takes a new one
    kept = names(graph)[1] & names(result)[1]
    assert {"w1", "w3", "b3", "flat", "shape"} <= kept  # stored plainly: in their own initializers


def test_dropout_drops_in_training_alone() -> None:
    body = """g (float[N,4] x) => (float[N,6] y) { h = Gemm(x, w)  y = Dropout(h, ratio) }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(4, 6), "ratio": scalar(0.5)}))
    network = to_trainable(graph)
    x = torch.from_numpy(normal(200, 4))
    still = network.module(x)
    network.module.train()
    dropped = network.module(x)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_allclose(dropped[dropped != 0].detach(), 2 * still[dropped != 0].detach(), rtol=1e-5)


def test_a_kept_output_of_a_layer_is_not_written_to() -> None:
    network = to_trainable(block())
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in network.sites:
        network.layer(name).register_forward_hook(
            lambda module, inputs, y, name=name: kept.update({name: (y, y.detach().clone())})
        )
    network.module.train()
    network.module(torch.from_numpy(normal(3, 3, 8, 8)))
    assert len(kept) == 3 and all(torch.equal(y, copied) for y, copied in kept.values())


def test_low_precision_and_channels_last() -> None:
    network = to_trainable(block())
    x = torch.from_numpy(normal(4, 3, 8, 8))
    exact = network.module(x)
    last = network.module(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, exact, rtol=1e-5, atol=1e-5)
    network.module.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = network.module(x)
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.module.parameters())


def test_the_whole_module_compiles_into_one_graph() -> None:
    weights = {"w": normal(4, 3, 3, 3), "zero": np.array(0), "axis": ints(0), "rest": ints(-1, 4)}
    graph = OnnxGraph.from_model(onnx_model(SIZES, weights), {"x": (1, 3, 8, 8)})
    module = to_trainable(graph).module
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.from_numpy(normal(3, 3, 8, 8))
    torch.testing.assert_close(compiled(x), module(x))


HALF = """g (float16[N,3,6,6] x) => (float16[N,4,6,6] y) {
    h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)  m = Mul(h, gain)  y = Relu(m)
}"""


def test_half_precision_is_trained_in_single_and_stored_in_half() -> None:
    weights = {"w": normal(4, 3, 3, 3).astype(np.float16), "gain": normal(4, 1, 1).astype(np.float16)}
    graph = OnnxGraph.from_model(onnx_model(HALF, weights))
    network = to_trainable(graph)
    assert all(p.dtype == torch.float32 for p in network.module.parameters())
    step(network, [{"x": normal(1, 3, 6, 6, seed=s).astype(np.float16)} for s in range(2)], 0.1)
    result = trained(graph, network)
    assert {t.data_type for t in result.model().graph.initializer} == {TensorProto.FLOAT16}
    assert names(result) == names(graph)


REFUSED = {
    "recurrent": (
        "g (float[5,N,4] x) => (float[5,1,N,3] y) { y = LSTM<hidden_size=3>(x, w, r) }",
        {"w": normal(1, 12, 4), "r": normal(1, 12, 3)},
        r"node '.*' \(LSTM\) cannot be trained: recurrent layers are not trained",
    ),
    "quantized": (
        "g (float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        {"s": scalar(0.1), "z": np.array(0, np.int8)},
        r"\(QuantizeLinear\) cannot be trained: quantized networks",
    ),
    "computed norm": (
        "g (float[N,4,3,3] x, float[4] s) => (float[N,4,3,3] y) { y = BatchNormalization(x, s, beta, mean, var) }",
        {n: v for n, v in batchnorm_weights(4).items() if n != "gamma"},
        r"\(BatchNormalization\) cannot be trained: its scale, shift, mean or variance is computed",
    ),
    "mixed samples": (
        "g (float[N,4] x) => (float[N,4] y) { m = ReduceMean<axes=[0], keepdims=1>(x)  y = Sub(x, m) }",
        {},
        "output 'y' of two samples is not that of each by itself",
    ),
    "no gradients": (
        "g (float[N,4] x) => (float[N,4] y) { k = CumSum(x, axis)  y = Add(x, k) }",
        {"axis": np.array(1)},
        r"\(CumSum\) cannot be trained: there is no such operator with gradients here",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name_and_reason(case: str) -> None:
    body, weights, reason = REFUSED[case]
    graph = OnnxGraph.from_model(onnx_model(body, weights))
    with pytest.raises(UnsupportedError, match=reason):
        to_trainable(graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet20_cifar10", "squeezenet_v1.0_imagenet", "ultraface_RFB-320", "yunet_n_dynamic", "fastestdet",
             "dtln_2"]
)  # fmt: skip
def test_a_real_network_trains_and_goes_back(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    shapes = {"input": (1, 3, 64, 96)} if name.startswith("yunet") else None
    graph = OnnxGraph.read(path, shapes)
    network = to_trainable(graph)
    assert set(network.layers) == {s.name for s in graph.sites().sites}
    feeds = graph.random_feeds(7)
    for found, wanted in zip(outputs(network, feeds), graph.run(feeds), strict=True):
        assert relative(found, wanted) < 1e-4 or np.abs(found - wanted).max() < 1e-6  # scores of almost 0
    assert step(network, [graph.random_feeds(seed) for seed in (8, 9)]) == []
    result = trained(graph, network)
    assert names(result) == names(graph)
    for found, wanted in zip(outputs(network, feeds), result.run(feeds), strict=True):
        assert relative(found, wanted) < 1e-4 or np.abs(found - wanted).max() < 1e-6  # scores of almost 0


@pytest.mark.parametrize(("name", "node"), [("silero_vad", "If"), ("resnet20_cifar10_qdq", "QuantizeLinear")])
def test_a_real_network_is_refused(name: str, node: str) -> None:
    path = MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with pytest.raises(UnsupportedError, match=rf"\({node}\) cannot be trained"):
        to_trainable(OnnxGraph.read(path))


def test_every_layer_is_a_stage_layer_called_once() -> None:
    network = to_trainable(block())
    calls = [str(node.target) for node in network.module.graph.nodes if node.op == "call_module"]
    for path in network.layers.values():
        assert calls.count(path) == 1 and isinstance(network.module.get_submodule(path), StageLayer)
