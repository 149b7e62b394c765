"""torch to ONNX with names kept, and a rewritten ONNX network back in its module."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from passes.core.site import Chain, Stage
from passes.drop_dead_code import DropDeadCode
from passes.drop_identities import DropIdentities
from passes.errors import InputError, UnsupportedError, UsageError
from passes.factorize import Factorize
from passes.fold_batchnorm import FoldBatchNorm
from passes.fuse_pointwise import FusePointwise
from passes.fx_export import to_onnx
from passes.fx_graph import FxGraph
from passes.fx_rewritten import rewritten
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_module import to_trainable, trained
from passes.training.layers import StageLayer


class Network(nn.Module):
    """Convolutions with and without BatchNorm, a linear layer on tokens that is called twice, gains of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 8))
        self.token = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = self.last(x + self.body(x))  # behind a sum: this BatchNorm cannot be folded
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.token(torch.tanh(self.token(tokens) * self.gain))
        scores: Tensor = self.head(tokens.mean(1).view(image.size(0), -1))
        return scores


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    made = Network()
    with torch.no_grad():
        for _ in range(3):
            made.train()(torch.randn(16, 3, 6, 6) * 2 + 1)
    return made.eval()


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def exported(network: nn.Module, dynamic_batch: bool = True) -> onnx.ModelProto:
    return to_onnx(network, [IMAGES[:2]], ["image"], ["scores"], dynamic_batch)


def test_layers_and_parameters_keep_their_paths(network: Network) -> None:
    model = exported(network)
    graph = OnnxGraph.from_model(model)
    names = ["stem", "body.0", "token", "token_1", "head"]
    assert [s.name for s in graph.sites().sites] == names
    assert [s.name for s in FxGraph.trace(network, IMAGES[:1]).sites().sites] == names
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for path, tensor in network.state_dict().items():
        if not path.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(stored[path], tensor.numpy())
    assert [n.op_type for n in model.graph.node].count("BatchNormalization") == 2
    assert (graph.inputs[0].shape, graph.outputs[0].shape) == (("batch", 3, 6, 6), ("batch", 5))
    with torch.no_grad():
        np.testing.assert_allclose(graph.run({"image": IMAGES.numpy()})[0], network(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_fixed_batch_is_fixed(network: Network) -> None:
    assert OnnxGraph.from_model(exported(network, dynamic_batch=False)).inputs[0].shape == (2, 3, 6, 6)


def test_exporting_says_nothing_and_changes_nothing(network: Network, capfd: pytest.CaptureFixture[str]) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported(network)
    assert capfd.readouterr() == ("", "")
    assert network.training and all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_stage_layers_come_out_as_plain_layers() -> None:
    rng = np.random.default_rng(0)
    stage = Stage(rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal(4).astype(np.float32))
    network = nn.Sequential(nn.Linear(3, 6), StageLayer(stage, -1))
    model = to_onnx(network, [torch.randn(2, 3)], ["x"], ["y"])
    assert [(n.name, n.op_type) for n in model.graph.node] == [("0", "Gemm"), ("1", "Gemm")]
    assert {t.name for t in model.graph.initializer} == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_types_that_onnx_does_not_have_are_said_in_a_line() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).bfloat16()).float()

    with pytest.raises(UnsupportedError, match="Half cannot be exported to ONNX: "):
        to_onnx(Half(), [torch.randn(2, 3, 5, 5)], ["x"], ["y"])


def test_what_the_exporter_cannot_do_is_said_in_a_line() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x)

    with pytest.raises(UnsupportedError, match="Odd cannot be exported to ONNX: "):
        to_onnx(Odd(), [torch.randn(3, 3)], ["x"], ["y"])


def test_a_pt2_file_exports_like_its_module(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(network, (IMAGES,), dynamic_shapes=(batch,)), path)
    graph = FxGraph.read(path)
    model = to_onnx(graph.module, [IMAGES[:2]], ["image"], ["scores"])
    found = OnnxGraph.from_model(model)
    assert [s.name for s in found.sites().sites] == ["stem", "body.0", "token", "token_1", "head"]
    with torch.no_grad():
        np.testing.assert_allclose(found.run({"image": IMAGES.numpy()})[0], network(IMAGES), rtol=1e-4, atol=1e-5)


def lowered(network: Network, *, fused: bool = False) -> OnnxGraph:
    """Rewritten as the pipeline does it: canonical, layers in two of half the rank."""
    graph = OnnxGraph.from_model(exported(network))
    PassManager([DropIdentities(), FoldBatchNorm(), DropDeadCode()]).run(graph)
    chains = {}
    for site in graph.sites().sites:
        weight = site.stage.weight
        u, s, v = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
        rank = len(s) // 2
        geometry = type(site.stage.geometry).pointwise(site.stage.geometry.ndim)
        first = Stage(np.ascontiguousarray(v[:rank]).reshape(rank, *weight.shape[1:]), None, site.stage.geometry)
        left = (u[:, :rank] * s[:rank]).reshape(-1, rank, *(1,) * geometry.ndim)
        last = Stage(np.ascontiguousarray(left), site.stage.bias, geometry)
        chains[site.name] = Chain((first, last), "svd", (rank,))
    del chains["head"]
    PassManager([Factorize(chains), *([FusePointwise()] if fused else []), DropDeadCode()]).run(graph)
    return graph


def test_a_rewritten_network_comes_back_into_its_module(network: Network) -> None:
    graph = lowered(network)
    source = FxGraph.trace(network, IMAGES[:1])
    module = rewritten(source, graph)
    paths = dict(module.named_modules())
    for name in ("stem.svd_0", "stem.svd_1", "body.0.svd_0", "body.0.svd_1", "token.svd_0", "token_1.svd_1", "last"):
        assert name in paths, f"{name} is not among {sorted(paths)}"
    assert isinstance(paths["stem.svd_0"], nn.Conv2d) and isinstance(paths["token.svd_1"], nn.Linear)
    assert "body.1" not in paths  # folded
    with torch.no_grad():
        np.testing.assert_allclose(module(IMAGES), graph.run({"image": IMAGES.numpy()})[0], rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in module.parameters())
    assert source.sites().sites[0].name == "stem"  # the source is as it was


def test_trained_numbers_come_back_too(network: Network) -> None:
    graph = lowered(network)
    under = to_trainable(graph)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in under.module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
        for path in under.norms:
            under.module.get_submodule(path).running_mean.add_(0.5)  # type: ignore[operator, union-attr]
    result = trained(graph, under)
    module = rewritten(FxGraph.trace(network, IMAGES[:1]), result)
    assert {"last", "stem.svd_0", "token.svd_1"} <= set(dict(module.named_modules()))
    with torch.no_grad():
        np.testing.assert_allclose(module(IMAGES), result.run({"image": IMAGES.numpy()})[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.get_buffer("last.running_mean"), network.last.running_mean + 0.5)


def test_a_network_that_is_no_longer_the_module_comes_back_node_by_node(network: Network) -> None:
    graph = lowered(network)
    model = graph.model()
    for node in model.graph.node:  # names that say nothing of the module
        node.name = ""
    module = rewritten(FxGraph.trace(network, IMAGES[:1]), OnnxGraph.from_model(model))
    with torch.no_grad():
        np.testing.assert_allclose(module(IMAGES), graph.run({"image": IMAGES.numpy()})[0], rtol=1e-4, atol=1e-5)
    assert "stem.svd_0" not in dict(module.named_modules())


class Bottlenecks(nn.Module):
    """Two adjacent convolutions with nothing between them, whose factors can be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.Conv2d(16, 8, 1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.up(self.down(image)))


def test_layers_fused_across_sites_come_back() -> None:
    torch.manual_seed(0)
    network = Bottlenecks().eval()
    graph = OnnxGraph.from_model(exported(network))
    rng = np.random.default_rng(0)
    sites = {s.name: s for s in graph.sites().sites}
    down, up = sites["down"].stage, sites["up"].stage
    point = type(up.geometry).pointwise(2)
    square = rng.standard_normal((16, 2, 1, 1)).astype(np.float32)
    first = Stage(down.weight[:2].copy(), None, down.geometry)
    second = Stage(rng.standard_normal((3, 16, 1, 1)).astype(np.float32), None, point)
    third = Stage(rng.standard_normal((8, 3, 1, 1)).astype(np.float32), up.bias, point)
    chains = {"down": Chain((first, Stage(square, down.bias, point)), "svd", (2,)), "up": Chain((second, third), "svd")}
    PassManager([Factorize(chains), FusePointwise()]).run(graph)
    assert any("+" in s.name for s in graph.sites().sites)
    module = rewritten(FxGraph.trace(network, IMAGES[:1]), graph)
    assert len([m for m in module.modules() if isinstance(m, nn.Conv2d)]) == len(graph.sites().sites)
    with torch.no_grad():
        np.testing.assert_allclose(module(IMAGES), graph.run({"image": IMAGES.numpy()})[0], rtol=1e-4, atol=1e-5)


class Spare(nn.Module):
    """An input that nothing reads before one that is read, and a result by name with a value that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, mask: Tensor, image: Tensor) -> dict[str, object]:
        x = self.conv(image)
        return {"maps": (x, torch.relu(x)), "name": "spare"}


@pytest.mark.parametrize("named", [True, False])
def test_what_exporting_loses_is_there_again(named: bool) -> None:
    """By the module's own layers, and node by node where names say nothing."""
    torch.manual_seed(0)
    network = Spare().eval()
    mask = torch.zeros(1, 2)
    source = FxGraph.trace(network, {"mask": mask, "image": IMAGES[:1]})
    model = to_onnx(source.module, [mask, IMAGES[:1]], ["mask", "image"], [spec.name for spec in source.outputs])
    for node in model.graph.node:
        node.name = node.name if named else ""
    module = rewritten(source, OnnxGraph.from_model(model))
    with torch.no_grad():
        found, wanted = module(mask, IMAGES), network(mask, IMAGES)
    assert found["name"] == "spare"
    torch.testing.assert_close(found["maps"], wanted["maps"], rtol=1e-5, atol=1e-5)
    assert ("conv" in dict(module.named_modules())) is named


def test_same_padding_of_dilated_kernels_is_exported() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.Conv2d(4, 4, 5, padding="same")).eval()
    graph = OnnxGraph.from_model(exported(network))
    assert [site.stage.geometry.pads for site in graph.sites().sites] == [(2, 2, 2, 2), (2, 2, 2, 2)]
    with torch.no_grad():
        np.testing.assert_allclose(graph.run({"image": IMAGES.numpy()})[0], network(IMAGES), rtol=1e-4, atol=1e-5)
    assert network[0].padding == "same"  # the module stays as it is


class Twice(nn.Module):
    """A layer that is called twice, beside one that is called what its second call would be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.conv_1 = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv_1(self.conv(torch.relu(self.conv(image))))


def test_both_frontends_number_calls_alike() -> None:
    network = Twice().eval()
    names = [site.name for site in FxGraph.trace(network, IMAGES[:1]).sites().sites]
    assert names == ["conv", "conv_2", "conv_1"]
    assert [site.name for site in OnnxGraph.from_model(exported(network)).sites().sites] == names


def _normalized(kind: str, layer: nn.Conv2d) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of them are old spellings
        return {
            "weight_norm": nn.utils.parametrizations.weight_norm,
            "spectral_norm": nn.utils.parametrizations.spectral_norm,
            "weight_norm hook": nn.utils.weight_norm,
            "spectral_norm hook": nn.utils.spectral_norm,
        }[kind](layer)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "weight_norm hook", "spectral_norm hook"])
def test_parametrized_layers_are_sites_and_the_user_s_stay_parametrized(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(_normalized(kind, nn.Conv2d(3, 8, 3)), nn.ReLU(), _normalized(kind, nn.Conv2d(8, 4, 1)))
    network.eval()
    with torch.no_grad():
        wanted = network(IMAGES)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    graph = FxGraph.trace(network, IMAGES[:1])
    assert [site.name for site in graph.sites().sites] == ["0", "2"]
    model = to_onnx(network, [IMAGES[:2]], ["image"], ["scores"])
    assert [site.name for site in OnnxGraph.from_model(model).sites().sites] == ["0", "2"]
    with torch.no_grad():
        torch.testing.assert_close(graph.module(IMAGES), wanted)
        torch.testing.assert_close(network(IMAGES), wanted)
    torch.testing.assert_close(dict(network.state_dict()), before)
    loss = network.train()(IMAGES).sum()
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("examples", [5, None, {1, 2}, "image"])
def test_examples_that_are_no_tensors_are_refused(network: Network, examples: object) -> None:
    with pytest.raises(InputError, match="example inputs cannot be a"):
        FxGraph.trace(network, examples)  # type: ignore[arg-type]


def test_an_array_is_an_example(network: Network) -> None:
    assert FxGraph.trace(network, IMAGES[:1].numpy()).input_shapes == {"image": (1, 3, 6, 6)}


class Echo(nn.Module):
    """A result that is called like the input, and one that is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"image": self.conv(image), "same": image}


def test_outputs_called_like_inputs_get_names_of_their_own() -> None:
    torch.manual_seed(0)
    network = Echo().eval()
    graph = FxGraph.trace(network, IMAGES[:1])
    names = [spec.name for spec in graph.outputs]
    assert names == ["image_1", "same"]
    model = to_onnx(graph.module, [IMAGES[:2]], ["image"], names)
    found = OnnxGraph.from_model(model).run({"image": IMAGES.numpy()})
    with torch.no_grad():
        wanted = network(IMAGES)
    np.testing.assert_allclose(found[0], wanted["image"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[1], IMAGES)
    with pytest.raises(UsageError, match="both be called 'image'"):
        FxGraph.trace(network, IMAGES[:1], output_names=["image", "same"])
