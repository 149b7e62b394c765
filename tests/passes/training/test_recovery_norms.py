"""BatchNorm that is put into a folded network: the same function at first, and again once it is folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from passes import registry
from passes.core.factor import chain_of
from passes.core.fit import FitProblem
from passes.core.site import Chain, Geometry, Stage
from passes.fold_batchnorm import FoldBatchNorm
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_module import to_trainable
from passes.training.data import TrainingSet
from passes.training.layers import ChainLayer, StageLayer
from passes.training.network import TrainableNetwork
from passes.training.recovery_norms import NormalizedChain, Norms, ScaleNorm, fold_all, insert

DIGITS = Path(__file__).parents[3] / "examples" / "digits.onnx"


def images(count: int, seed: int = 0) -> TrainingSet:
    rng = np.random.default_rng(seed)
    return TrainingSet.of({"image": rng.standard_normal((count, 1, 16, 16)).astype(np.float32)})


@pytest.fixture(scope="module")
def dense() -> TrainableNetwork:
    graph = OnnxGraph.read(DIGITS)
    PassManager([FoldBatchNorm()]).run(graph)
    return to_trainable(graph)


def compressed(dense: TrainableNetwork) -> TrainableNetwork:
    """The 3x3 convolutions between equal widths as Tucker-2 of rank 8, by their weights alone."""
    network = dense.clone()
    tucker = registry.FORMATS.load("tucker2")
    for name, site in network.sites.items():
        stage = site.stage
        if stage.geometry.ndim == 2 and stage.in_channels == stage.out_channels:
            problem = FitProblem(stage.grouped_weight().astype(np.float64))
            stages = tucker.decompose(stage.geometry, problem).stages((8, 8))
            network.put(name, ChainLayer(chain_of("tucker2", (8, 8), stages, stage.bias)))
    return network


def outputs(network: TrainableNetwork, data: TrainingSet) -> torch.Tensor:
    network.module.eval()
    with torch.no_grad():
        found: torch.Tensor = network.module(data.inputs["image"])
    return found


@pytest.mark.parametrize("norms", ["biased", "all"])
def test_what_is_put_in_changes_nothing_and_folds_again_after_training(dense: TrainableNetwork, norms: Norms) -> None:
    network, data = compressed(dense), images(64)
    before = outputs(network, data)
    kinds = {name: type(network.layer(name)) for name in network.layers}
    shapes = {name: [s.bias is None for s in stages_of(network.layer(name))] for name in network.layers}
    sites = insert(network, data, norms)
    assert set(sites) == {name for name, site in network.sites.items() if site.stage.geometry.ndim}
    torch.testing.assert_close(outputs(network, data), before, rtol=1e-4, atol=1e-5)

    optimizer = torch.optim.SGD(network.module.parameters(), lr=0.01)
    network.module.train()
    for _ in range(5):
        optimizer.zero_grad()
        network.module(data.inputs["image"]).square().mean().backward()
        optimizer.step()
    trained = outputs(network, data)
    assert not torch.allclose(trained, before, atol=1e-2), "five steps change the function"
    fold_all(network)
    torch.testing.assert_close(outputs(network, data), trained, rtol=1e-4, atol=1e-4)
    assert {name: type(network.layer(name)) for name in network.layers} == kinds
    assert {n: [s.bias is None for s in stages_of(network.layer(n))] for n in network.layers} == shapes
    assert not any(isinstance(m, nn.BatchNorm2d | ScaleNorm) for m in network.module.modules())


def stages_of(layer: nn.Module) -> list[Stage]:
    return [layer.stage()] if isinstance(layer, StageLayer) else list(layer.chain())  # type: ignore[operator]


def test_statistics_are_those_of_all_samples(dense: TrainableNetwork) -> None:
    network, data = dense.clone(), images(10)
    name = next(iter(network.layers))
    insert(network, data, "biased", batch=3)  # 3, 3, 3 and 1: the mean of the batches' means would be another
    layer = network.layer(name)
    assert isinstance(layer, NormalizedChain)
    stage, norm = layer[0], layer[1]
    assert isinstance(stage, StageLayer) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        made = stage(data.inputs["image"]).double()  # the network's first layer
    flat = made.transpose(0, 1).reshape(made.shape[1], -1)
    torch.testing.assert_close(norm.running_mean.double(), flat.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), flat.var(1, correction=0), rtol=1e-4, atol=1e-6)


def test_filters_become_as_long_as_each_other_and_dead_ones_stay_short(dense: TrainableNetwork) -> None:
    network, data = dense.clone(), images(8)
    name = next(iter(network.layers))
    first = network.layer(name)
    assert isinstance(first, StageLayer)
    with torch.no_grad():
        first.weight[0] = 0.0
        first.weight[1] *= 1e-6
    before = outputs(network, data)
    insert(network, data, "biased")
    torch.testing.assert_close(outputs(network, data), before, rtol=1e-4, atol=1e-5)
    layer = network.layer(name)
    assert isinstance(layer, NormalizedChain) and isinstance(layer[0], StageLayer)
    lengths = layer[0].weight.detach().flatten(1).norm(dim=1)
    assert float(lengths[0]) == 0.0 and float(lengths[1]) < 1e-3
    torch.testing.assert_close(lengths[2:], torch.full_like(lengths[2:], 2.0), rtol=1e-5, atol=0.0)


def test_a_scale_norm_is_batchnorm_where_the_mean_is_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 5, 5) * torch.tensor([0.5, 2.0, 7.0]).view(1, 3, 1, 1)
    x = torch.cat([x, -x])  # each channel's mean is zero
    scale, batch = ScaleNorm(3).train(), nn.BatchNorm2d(3).train()
    torch.testing.assert_close(scale(x), batch(x), rtol=1e-4, atol=1e-5)


def test_a_stage_without_a_bias_is_scaled_and_stays_without() -> None:
    rng = np.random.default_rng(0)
    stage = Stage(rng.standard_normal((4, 2, 3, 3)).astype(np.float32), None, Geometry((3, 3)))
    norm = ScaleNorm(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.running_square.uniform_(0.5, 2.0)
    layer = NormalizedChain(ChainLayer(Chain((stage,))), {0: norm}).eval()
    x = torch.randn(2, 2, 6, 6)
    wanted = layer(x)
    folded = layer.folded()
    assert isinstance(folded, ChainLayer) and folded.chain().stages[0].bias is None
    torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (7, 2, 6), (3, 2, 2, 3, 2)])
def test_scale_norm_has_the_gradients_of_its_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    norm = ScaleNorm(shape[1]).double().train()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, shape[1]))
    wanted = norm.weight.view(1, -1, *(1,) * (x.ndim - 2)) * x
    wanted = wanted / (x.square().mean((0, *range(2, x.ndim)), keepdim=True) + norm.eps).sqrt()
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    by_formula = torch.autograd.grad(wanted, (x, norm.weight), g)
    found = norm(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (x, norm.weight), g), by_formula)


def test_scale_norm_keeps_the_layout_and_the_type() -> None:
    x = torch.randn(8, 6, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ScaleNorm(6).train()(x)
    y.backward(torch.ones_like(y))
    for tensor in (y, x.grad):
        assert tensor is not None and tensor.dtype is torch.bfloat16
        assert tensor.is_contiguous(memory_format=torch.channels_last)
