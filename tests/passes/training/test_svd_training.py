"""SVD training: penalties against closed formulas, pruning against brute force, chains against the layer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.core.site import Site
from passes.errors import UsageError
from passes.training.factored import LayerScan, chain_macs, put, scan, selected
from passes.training.layers import ChainLayer
from passes.training.svd_training import (
    Layout,
    SvdLayer,
    SvdOptions,
    SvdTraining,
    check_reachable,
    energy_rank,
    hoyer,
    orthogonality,
    pruned_at,
    pruned_chains,
    pruned_to,
)

LAYERS = {
    "strided": nn.Conv2d(5, 7, 3, stride=2, padding=1),
    "oblong": nn.Conv2d(4, 6, (3, 5), padding=(1, 2), bias=False),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "row": nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
    "pointwise": nn.Conv2d(6, 4, 1),
    "1-D": nn.Conv1d(4, 6, 3, padding=1),
    "linear": nn.Linear(6, 5),
}
SHAPES = {"strided": (5, 9, 8), "oblong": (4, 6, 7), "dilated": (4, 7, 7), "row": (4, 3, 6), "pointwise": (6, 4, 4)}
SHAPES |= {"1-D": (4, 9), "linear": (3, 6)}


def site_of(name: str) -> Site:
    torch.manual_seed(sorted(LAYERS).index(name))
    layer = LAYERS[name]
    layer.reset_parameters()
    return scan(nn.Sequential(layer), [torch.zeros(1, *SHAPES[name])]).sites[0]


@pytest.mark.parametrize("layout", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_factors_equal_the_layer_and_their_chain_equals_them(name: str, layout: Layout) -> None:
    site = site_of(name)
    layer = SvdLayer(site, layout)
    x = torch.randn(3, *SHAPES[name], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), LAYERS[name](x), rtol=0, atol=1e-5)
    u, v = layer.matrices()
    torch.testing.assert_close(u.T @ u, torch.eye(len(layer.s)), rtol=0, atol=1e-5)
    torch.testing.assert_close(v @ v.T, torch.eye(len(layer.s)), rtol=0, atol=1e-5)
    with torch.no_grad():  # as after training: nothing orthogonal, signs mixed, no order
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        layer.s[::2] *= -1
    chain = layer.chain()
    torch.testing.assert_close(ChainLayer(chain, site.channel_axis)(x), layer(x), rtol=0, atol=1e-5)
    # the square roots of s stand on both sides: column by column as long as U and V are
    first, second = (torch.from_numpy(stage.weight) for stage in chain)
    root = layer.s.detach().abs().sqrt()
    torch.testing.assert_close(first.flatten(1).norm(dim=1), root * layer.right.detach().flatten(1).norm(dim=1))
    torch.testing.assert_close(
        second.movedim(1, 0).flatten(1).norm(dim=1), root * layer.matrices()[0].detach().norm(dim=0)
    )


def test_the_spatial_layout_walks_down_and_then_along() -> None:
    layer = SvdLayer(site_of("strided"), "spatial")
    assert tuple(layer.right.shape) == (15, 5, 3, 1) and tuple(layer.left.shape) == (7, 15, 1, 3)
    assert [g.strides for g in layer.geometries] == [(2, 1), (1, 2)]
    channel = SvdLayer(site_of("strided"), "channel")
    assert tuple(channel.right.shape) == (7, 5, 3, 3) and tuple(channel.left.shape) == (7, 7, 1, 1)


def test_penalties_are_their_formulas() -> None:
    layer = SvdLayer(site_of("strided"), "spatial").double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    u = layer.left.detach().permute(0, 2, 3, 1).reshape(21, 15).numpy()
    v = layer.right.detach().reshape(15, 15).numpy()
    wanted = sum(np.linalg.norm(m - np.eye(15)) ** 2 for m in (u.T @ u, v @ v.T)) / 15**2
    assert float(orthogonality(layer)) == pytest.approx(wanted, rel=1e-12)
    s = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    assert float(hoyer(s)) == pytest.approx(7 / 5, rel=1e-12)
    assert float(hoyer(torch.ones(9))) == pytest.approx(3.0, rel=1e-6)
    assert float(hoyer(7 * s)) == pytest.approx(float(hoyer(s)), rel=1e-12)
    assert float(hoyer(torch.zeros(4))) == 0.0
    # d/ds_i |s|_1/|s|_2 = sign(s_i)/|s|_2 - |s|_1 s_i/|s|_2^3
    x = torch.tensor([3.0, -4.0, 1.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(hoyer(x))
    norm = math.sqrt(26)
    closed = [np.sign(v) / norm - 8 * v / norm**3 for v in (3.0, -4.0, 1.0)]
    assert x.grad is not None and np.allclose(x.grad.numpy(), closed, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(hoyer, x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [("constant", [1, 1, 1]), ("linear", [1, 0.75, 0]), ("cosine", [1, 0.5 + 0.5 * math.sqrt(0.5), 0])],
)
def test_the_objective_weighs_its_terms(decay: str, wanted: list[float]) -> None:
    net, _, sites = small("channel")
    options = SvdOptions(orthogonality=2.0, sparsity=0.3, decay=decay)  # type: ignore[arg-type]
    batch = {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)), "labels": torch.tensor([1, 3])}
    plain = F.cross_entropy(net(batch["x"]), batch["labels"])
    layers = factors(net, sites)
    ortho, sparse = (sum(f(x) for x in layers.values()) for f in (orthogonality, lambda x: hoyer(x.s)))
    for epoch, weight in zip((0.0, 2.5, 10.0), wanted, strict=True):
        found_loss = SvdTraining(options)(net, batch, epoch, 10.0)
        torch.testing.assert_close(found_loss, plain + 2 * ortho + 0.3 * weight * sparse, rtol=1e-5, atol=0)


def test_energy_is_kept_by_the_fewest_values() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        s = rng.standard_normal(6) * rng.choice([0.01, 1.0, 3.0], 6)
        share = float(rng.uniform(0, 1))
        fewest = min(
            len(kept)
            for size in range(1, 7)
            for kept in itertools.combinations(s, size)
            if sum(x * x for x in kept) >= (1 - share) * float((s**2).sum()) * (1 - 1e-12)
        )
        assert energy_rank(s, share) == fewest
    assert energy_rank(np.array([2.0, 0.0, 0.0]), 0.0) == 1
    assert energy_rank(np.zeros(3), 0.0) == 1


def small(layout: Layout) -> tuple[nn.Sequential, LayerScan, tuple[Site, ...]]:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(12, 6, 1),
        nn.Flatten(),
        nn.Linear(96, 4),
    ).eval()
    found = scan(net, [torch.zeros(1, 3, 8, 8)])
    sites, _ = selected(found, (), ())
    for site in sites:
        put(net, site.name, SvdLayer(site, layout))
    return net, found, sites


def factors(net: nn.Module, sites: tuple[Site, ...]) -> dict[str, SvdLayer]:
    found = {site.name: net.get_submodule(site.name) for site in sites}
    return {name: layer for name, layer in found.items() if isinstance(layer, SvdLayer)}


@pytest.mark.parametrize("layout", ["channel", "spatial"])
def test_pruning_to_a_limit_loses_the_least_energy_that_meets_it(layout: Layout) -> None:
    net, found, sites = small(layout)
    layers = factors(net, sites)
    for part in (0.35, 0.5, 0.8, 1.0):
        pruning = pruned_to(found, sites, layers, part * found.macs)
        assert pruning.macs <= part * found.macs
        tried = (pruned_at(found, sites, layers, share / 4000) for share in range(4001))
        first = next(trial for trial in tried if trial.macs <= part * found.macs)
        assert pruning.share <= first.share < pruning.share + 1 / 4000 + 1e-12
        chains = pruned_chains(sites, layers, pruning)
        assert pruning.macs == found.total_macs({s.name: chain_macs(s, chains[s.name]) for s in sites})


def test_pruned_chains_keep_the_largest_values_and_dense_ones_keep_all() -> None:
    net, found, sites = small("channel")
    layers = factors(net, sites)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    before = net(x)
    nothing = pruned_at(found, sites, layers, 0.0)
    assert set(nothing.ranks.values()) == {None} and nothing.macs == found.macs
    for name, chain in pruned_chains(sites, layers, nothing).items():
        put(net, name, ChainLayer(chain))
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-5)
    site = sites[0]
    chain = layers[site.name].chain(3)
    dense = site.stage.weight.astype(np.float64).reshape(8, -1)
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    product = chain.stages[1].weight.reshape(8, 3) @ chain.stages[0].weight.reshape(3, -1)
    np.testing.assert_allclose(product, (u[:, :3] * s[:3]) @ v[:3], rtol=0, atol=1e-6)


def test_out_of_reach_is_said_before_training() -> None:
    net, found, sites = small("channel")
    formats = {name: layer.format for name, layer in factors(net, sites).items()}
    check_reachable(found, sites, formats, 0.5 * found.macs)
    with pytest.raises(UsageError, match="no rank meets 10 multiply-adds: with rank 1 everywhere the network has"):
        check_reachable(found, sites, formats, 10)
    with pytest.raises(UsageError, match="must be at least 0"):
        SvdOptions(sparsity=-0.1)
