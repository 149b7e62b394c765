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
from passes.training.recovery_norms import NormalizedChain, Norms, UnitFilters, fold_all, insert

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
    assert not any(isinstance(m, nn.BatchNorm2d | UnitFilters) for m in network.module.modules())


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


def test_unit_filters_are_the_stage_at_first_and_train_length_and_direction_apart() -> None:
    rng = np.random.default_rng(0)
    stage = Stage(rng.standard_normal((4, 2, 3, 3)).astype(np.float32), None, Geometry((3, 3)))
    unit = UnitFilters(StageLayer(stage))
    np.testing.assert_allclose(unit.stage().weight, stage.weight, rtol=1e-6, atol=0.0)
    lengths = unit.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 2.0), rtol=1e-6, atol=0.0)

    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    unit(x).square().mean().backward()
    # no length of v changes the function: its gradient is perpendicular to it
    assert unit.weight.grad is not None and unit.gain.grad is not None
    along = (unit.weight.grad * unit.weight.detach()).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros(4), rtol=0.0, atol=1e-5)
    assert float(unit.gain.grad.abs().min()) > 1e-3

    with torch.no_grad():
        unit.weight.mul_(3.0)
        unit.gain.mul_(torch.tensor([1.0, 2.0, 0.5, 0.0]))
    wanted = stage.weight * np.array([1.0, 2.0, 0.5, 0.0], np.float32).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(unit.stage().weight, wanted, rtol=1e-5, atol=0.0)
    folded = NormalizedChain(ChainLayer(Chain((stage,))), {}, frozenset({0})).folded()
    assert isinstance(folded, ChainLayer) and folded.chain().stages[0].bias is None


def test_a_dead_filter_inside_a_chain_stays_finite() -> None:
    weight = np.ones((2, 3, 1, 1), np.float32)
    weight[0] = 0.0
    unit = UnitFilters(StageLayer(Stage(weight, None, Geometry((1, 1)))))
    unit(torch.randn(1, 3, 2, 2, requires_grad=True)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in unit.parameters())
    np.testing.assert_allclose(unit.stage().weight, weight, rtol=1e-6, atol=0.0)
