"""What torch networks hold: sites that compute what torch computes, or notes that say why not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.core.reference import apply_stage, relative_l2
from passes.core.site import Chain, Geometry, Site, Stage
from passes.fx_graph import FxGraph
from passes.manager import PassManager
from passes.registry import PASSES
from passes.training.layers import ChainLayer, StageLayer

TOLERANCE = 2e-6


class Apply(nn.Module):
    """A function of x and of parameters w, b; ``module`` is there for functions that call it."""

    def __init__(self, function: Any, w: Tensor | None = None, b: Tensor | None = None, module: Any = None) -> None:
        super().__init__()
        self.function, self.module = function, module
        self.w = None if w is None else nn.Parameter(w)
        self.b = None if b is None else nn.Parameter(b)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


def traced(module: nn.Module, *shape: int) -> FxGraph:
    torch.manual_seed(0)
    return FxGraph.trace(module, torch.zeros(shape))


def rotated(site: Site) -> Chain:
    """The layer as a chain of full rank: turned by an orthogonal matrix in each group, then turned back."""
    stage, g = site.stage, site.stage.geometry
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((g.groups, *(stage.out_channels // g.groups,) * 2)))[0]
    grouped = stage.grouped_weight().reshape(*q.shape[:2], -1).astype(np.float64)
    turned = (q @ grouped).reshape(stage.weight.shape).astype(np.float32)
    back = q.swapaxes(1, 2).reshape(stage.out_channels, -1, *(1,) * g.ndim).astype(np.float32)
    last = Stage(back, stage.bias, Geometry.pointwise(g.ndim, g.groups))
    return Chain((Stage(turned, None, g), last), "rotated", (stage.out_channels // g.groups,))


def channels_second(site: Site, value: np.ndarray) -> np.ndarray:
    if site.stage.geometry.ndim:
        return value
    return np.moveaxis(value, site.channel_axis, -1).reshape(-1, value.shape[site.channel_axis])


def check_single_site(graph: FxGraph) -> Site:
    """The one site computes, by the float64 reference, what the network computes; so does a chain in its place."""
    scan = graph.sites()
    (site,) = scan.sites
    assert scan.kept == ()
    feeds = graph.random_feeds(1)
    (x,) = feeds.values()
    (y,) = graph.run(feeds)
    expected = apply_stage(site.stage, channels_second(site, x).astype(np.float64))
    assert relative_l2(channels_second(site, y), expected) < TOLERANCE
    graph.replace(site, rotated(site))
    graph.check()
    (found,) = graph.run(feeds)
    assert relative_l2(found, y) < TOLERANCE
    assert [s.output for s in graph.sites().sites][-1] == site.output
    return site


MODULES = [
    (nn.Conv1d(4, 6, 5, stride=2, padding=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (2, 4, 9, 8)),
    (nn.Conv2d(3, 6, (4, 3), padding="same", bias=False), (1, 3, 7, 7)),
    (nn.Conv2d(3, 6, 3, padding="valid"), (1, 3, 7, 7)),
    (nn.Conv3d(2, 4, 3, padding=1), (1, 2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=(1, 0), groups=2), (2, 4, 5, 6)),
    (nn.ConvTranspose3d(2, 4, 2, stride=2), (1, 2, 3, 3, 3)),
    (nn.Linear(7, 5), (3, 7)),
    (nn.Linear(7, 5, bias=False), (2, 3, 7)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: getattr(type(value), "__name__", ""))
def test_modules_are_sites_named_by_their_path(module: nn.Module, shape: tuple[int, ...]) -> None:
    site = check_single_site(traced(nn.Sequential(nn.Sequential(module)), *shape))
    assert site.name == "0.0" and site.weight_key == "0.0.weight"
    assert check_single_site(traced(module, *shape)).stage.geometry == site.stage.geometry


FUNCTIONS = {
    "F.conv2d": (lambda s, x: F.conv2d(x, s.w, s.b, (2, 1), 1), normal(6, 4, 3, 3), (2, 4, 7, 7)),
    "same": (lambda s, x: torch.conv2d(x, s.w, s.b, padding="same"), normal(6, 4, 4, 3), (2, 4, 7, 7)),
    "F.conv1d": (lambda s, x: F.conv1d(x, weight=s.w, groups=2), normal(6, 2, 3), (2, 4, 7)),
    "transposed": (lambda s, x: F.conv_transpose2d(x, s.w, s.b, 2, 1, 1), normal(4, 6, 3, 3), (1, 4, 5, 5)),
    "F.linear": (lambda s, x: F.linear(x, s.w, s.b), normal(6, 4), (2, 3, 4)),
    "turned": (lambda s, x: F.linear(x, s.w.t()), normal(4, 6), (2, 4)),
    "matmul": (lambda s, x: x @ s.w, normal(4, 6), (2, 3, 4)),
    "method": (lambda s, x: x.matmul(s.w.permute(1, 0)), normal(6, 4), (2, 3, 4)),
    "left": (lambda s, x: torch.matmul(s.w, x), normal(6, 4), (2, 4, 3)),
    "named in another order": (lambda s, x: torch.matmul(other=s.w, input=x), normal(4, 4), (4, 4)),
    "mm": (lambda s, x: torch.mm(x, s.w), normal(4, 6), (3, 4)),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w, beta=2, alpha=0.5), normal(4, 6), (3, 4)),
    "computed from constants": (lambda s, x: F.linear(x, s.w / s.w.norm(dim=1, keepdim=True)), normal(6, 4), (2, 4)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_with_a_stored_weight_are_sites(name: str) -> None:
    function, weight, shape = FUNCTIONS[name]
    check_single_site(traced(Apply(function, weight, normal(6)), *shape))


@pytest.mark.parametrize("name", ["same", "transposed", "addmm", "left"])
def test_what_is_exported_is_read_the_same(name: str, tmp_path: Any) -> None:
    function, weight, shape = FUNCTIONS[name]
    module = Apply(function, weight, normal(6)).eval()
    program = torch.export.export(module, (torch.zeros(shape),))
    expected = traced(module, *shape).sites().sites[0].stage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside of torch
        programs = [program, program.run_decompositions()]
    for index, each in enumerate(programs):
        path = tmp_path / f"{index}.pt2"
        torch.export.save(each, path)
        graph = FxGraph.read(path)
        stage = graph.sites().sites[0].stage
        np.testing.assert_allclose(stage.weight, expected.weight, rtol=1e-6)
        if index == 0 or name != "same":  # decomposing takes uneven padding out of the layer
            assert stage.geometry == expected.geometry
        x = normal(*shape, seed=3)
        with torch.no_grad():
            assert relative_l2(graph.run({"x": x.numpy()})[0], module(x).numpy()) < TOLERANCE


class Scaled(nn.Conv2d):
    """A subclass that does something else with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 2, self.bias, self.stride, self.padding)


class Dynamic(nn.Conv2d):
    """Its weight depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


def hooked() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda module, args, y: y * 2)
    return layer


KEPT = [
    (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), (1, 3, 6, 6), "pads by 'reflect'"),
    (nn.Sequential(Dynamic(3, 4, 3)), (1, 3, 6, 6), "its weight is computed by mul"),
    (nn.Sequential(hooked()), (1, 3, 6, 6), "hooks"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), (3, 6, 6), "needs batch and channels"),
    (nn.Sequential(nn.LSTM(4, 5)), (7, 2, 4), "recurrent"),
    (Apply(lambda s, x: x @ x.transpose(1, 2)), (2, 3, 4), "both operands are computed"),
    (Apply(lambda s, x: torch.einsum("bi,io->bo", x, s.w), normal(4, 6)), (2, 4), "Einsum"),
    (Apply(lambda s, x: torch.bmm(x, s.w), normal(2, 4, 6)), (2, 3, 4), "batch of matrices"),
    (Apply(lambda s, x: x @ s.w, normal(2, 4, 6)), (2, 3, 4), "batch of matrices"),
    (Apply(lambda s, x: s.module(x, [11, 11]), module=nn.ConvTranspose2d(3, 4, 3, 2)), (1, 3, 5, 5), "output size"),
]


@pytest.mark.parametrize(("module", "shape", "reason"), KEPT, ids=[case[2] for case in KEPT])
def test_what_is_no_site_is_kept_with_a_reason(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    graph = traced(module, *shape)
    scan = graph.sites()
    assert scan.sites == ()
    (note,) = scan.kept
    assert reason in note.reason and note.node in {op.name for op in graph.workload()}
    feeds = graph.random_feeds(0)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(next(iter(feeds.values()))))
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert relative_l2(graph.run(feeds)[0], expected.numpy()) < TOLERANCE


def test_a_subclass_is_a_site_with_the_weight_that_it_uses() -> None:
    layer = Scaled(3, 4, 3, padding=1)
    site = check_single_site(traced(nn.Sequential(layer), 1, 3, 6, 6))
    np.testing.assert_array_equal(site.stage.weight, 2 * layer.weight.detach().numpy())
    assert site.name == "0"


def test_a_parametrized_layer_is_a_site_with_the_weight_that_it_has() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    site = check_single_site(traced(nn.Sequential(layer), 1, 3, 6, 6))
    np.testing.assert_array_equal(site.stage.weight, layer.weight.detach().numpy())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.relu(self.conv(x))))


def test_a_module_called_twice_is_two_sites_with_one_weight() -> None:
    graph = traced(Twice(), 1, 4, 5, 5)
    first, second = graph.sites().sites
    assert (first.name, second.name) == ("conv", "conv_1")
    assert first.weight_key == second.weight_key == "conv.weight"
    weights = 4 * 4 * 9 + 4
    assert [op.weight_params for op in graph.workload() if op.stage] == [weights, 0], "what is shared counts once"
    feeds = graph.random_feeds(0)
    reference = graph.run(feeds)[0]
    for site in (second, first):
        other = graph.clone()
        other.replace(site, rotated(site))
        other.check()
        assert len(other.sites().sites) == 3
        assert relative_l2(other.run(feeds)[0], reference) < TOLERANCE
    doubled = first.stage.affine(np.full(4, 2.0), np.zeros(4))
    graph.replace(first, Chain((doubled,)))
    assert relative_l2(graph.run(feeds)[0], reference) > 0.1
    np.testing.assert_array_equal(graph.sites().sites[1].stage.weight, second.stage.weight)


def test_tied_parameters_have_one_key_in_clones_as_well() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    graph = traced(net, 2, 4)
    for each in (graph, graph.clone()):
        assert [s.weight_key for s in each.sites().sites] == ["0.weight", "0.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_new_layers_keep_the_type_of_the_weight(dtype: torch.dtype) -> None:
    graph = FxGraph.trace(nn.Sequential(nn.Linear(6, 6)).to(dtype), torch.zeros(2, 6, dtype=dtype))
    (site,) = graph.sites().sites
    assert site.stage.weight.dtype == (np.float64 if dtype is torch.float64 else np.float32)
    graph.replace(site, rotated(site))
    graph.check()
    assert {p.dtype for p in graph.module.parameters()} == {dtype}


def test_new_layers_are_torchs_own_where_it_has_them() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, (4, 1), padding="same"), nn.Linear(5, 6))
    graph = traced(net, 1, 3, 5, 5)
    for site in graph.sites().sites:
        graph.replace(site, rotated(site))
    kinds = [type(graph.module.get_submodule(s.name)) for s in graph.sites().sites]
    assert kinds == [nn.Conv2d, nn.Conv2d, StageLayer, nn.Conv2d, nn.Linear, nn.Linear]


def test_a_trained_chain_is_read_again() -> None:
    site = traced(nn.Sequential(nn.Conv2d(3, 6, 3)), 1, 3, 6, 6).sites().sites[0]
    graph = traced(nn.Sequential(ChainLayer(rotated(site)), nn.BatchNorm2d(6)), 1, 3, 6, 6)
    assert [s.name for s in graph.sites().sites] == ["0.0", "0.1"]
    feeds = graph.random_feeds(0)
    reference = graph.run(feeds)[0]
    PassManager([PASSES.load("fold-batchnorm")()]).run(graph)
    assert [op.op for op in graph.workload()] == ["Conv", "Conv"]
    assert relative_l2(graph.run(feeds)[0], reference) < TOLERANCE


def test_networks_may_be_deeper_than_pythons_stack() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1200):
                x = torch.relu(x) + x
            return self.fc(x * 0)

    graph = traced(Deep(), 1, 2)
    assert len(graph.workload()) == 2402 and len(graph.clone().sites().sites) == 1
