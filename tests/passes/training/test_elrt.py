"""ELRT: the penalty against its definition, ranks against brute force, and how loud random chains are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.core.site import compose
from passes.errors import UsageError
from passes.training.data import generator
from passes.training.elrt import (
    Elrt,
    Pick,
    double_orthogonality,
    given_ranks,
    outer_factors,
    scratch_chain,
    scratch_layers,
    uniform_ranks,
)
from passes.training.factored import put, scan, selected, site_macs
from passes.training.layers import ChainLayer


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(),
        nn.Linear(16 * 16, 4),
    )


IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4)])
def test_double_orthogonality_is_its_definition(shape: tuple[int, int]) -> None:
    f = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n, r = shape
    wanted = (
        torch.linalg.matrix_norm(f.T @ f - torch.eye(r)) ** 2 + torch.linalg.matrix_norm(f @ f.T - torch.eye(n)) ** 2
    )
    torch.testing.assert_close(double_orthogonality(f), wanted, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(double_orthogonality, f.clone().requires_grad_(), atol=1e-6, rtol=1e-6)


def test_double_orthogonality_is_least_for_orthonormal_columns() -> None:
    q = nn.init.orthogonal_(torch.empty(9, 4, dtype=torch.float64), generator=torch.Generator().manual_seed(1))
    # ||Q^T Q - I||^2 = 0, and Q Q^T - I projects on the 9 - 4 directions that are left
    assert float(double_orthogonality(q)) == pytest.approx(5.0, abs=1e-12)


def test_the_objective_adds_the_penalty_of_the_outer_factors() -> None:
    net = network()
    found = scan(net, [IMAGE])
    sites, _ = selected(found, (), ())
    picks = {"1": Pick("tucker2", (3, 4), 0), "4": Pick("svd", (5,), 0), "5": Pick("tucker2", (2, 2), 0)}
    for name, chain in scratch_layers(sites, picks, seed=0).items():
        put(net, name, ChainLayer(chain))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
    factors = [f for layer in net if isinstance(layer, ChainLayer) for f in outer_factors(layer)]
    assert [tuple(f.shape) for f in factors] == [(12, 4), (8, 3), (16, 5), (16, 2), (16, 2)]
    batch = {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)), "labels": torch.tensor([1, 3])}
    plain = F.cross_entropy(net(batch["x"]), batch["labels"])
    wanted = plain + 0.25 * sum(double_orthogonality(f) for f in factors)
    torch.testing.assert_close(Elrt(0.25)(net, batch, 0.0, 1.0), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(Elrt(0.0)(net, batch, 0.0, 1.0), plain, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # the penalty keeps its precision
        torch.testing.assert_close(Elrt().penalty(net), (wanted - plain) / 0.25, rtol=1e-5, atol=0)


def test_uniform_ranks_are_the_largest_share_within_the_limit() -> None:
    found = scan(network(), [IMAGE])
    sites, _ = selected(found, (), ())
    for part in (0.3, 0.5, 0.7, 0.9, 1.0):
        limit = part * found.macs
        picks = uniform_ranks(found, sites, limit)
        total = found.macs - sum(site_macs(s) for s in sites) + sum(p.macs for p in picks.values())
        assert total <= limit
        # brute force over 10,000 shares finds no plan between this one and the limit
        best = max(t for t in (_uniform_total(found, sites, q / 10_000) for q in range(10_001)) if t <= limit)
        assert total == best
    assert {p.format for p in uniform_ranks(found, sites, found.macs).values()} == {"dense"}


def _uniform_total(found, sites, q: float) -> int:  # type: ignore[no-untyped-def]
    """Multiply-adds where each site has the largest rank of at most a share q, from closed formulas."""
    total = found.macs
    for site in sites:
        out, inner, *kernel = site.stage.weight.shape
        taps = kernel[0] * kernel[1]
        before, after = site.input_shape[2] * site.input_shape[3], site.output_shape[2] * site.output_shape[3]
        dense = after * out * inner * taps
        costs = []
        for step in range(1, max(inner, out) + 1):
            if taps > 1:
                r1, r2 = (-(-step * full // max(inner, out)) for full in (inner, out))
                costs.append(before * inner * r1 + after * (r1 * r2 * taps + r2 * out))
            elif step <= min(inner, out):
                costs.append(after * step * (inner + out))
        costs = [*sorted(c for c in costs if c < dense), dense]
        total += max([c for c in costs if c <= q * dense], default=costs[0]) - dense
    return int(total)


def test_a_limit_below_rank_one_is_refused() -> None:
    found = scan(network(), [IMAGE])
    sites, _ = selected(found, (), ())
    with pytest.raises(UsageError, match=r"no rank meets 100 multiply-adds: with rank 1 everywhere the network has \d"):
        uniform_ranks(found, sites, 100)


@pytest.mark.parametrize(
    ("name", "pick"), [("1", ("tucker2", (3, 4))), ("4", ("svd", (5,))), ("5", ("spatial_svd_vh", (6,)))]
)
def test_a_random_chain_is_as_loud_as_the_layer(name: str, pick: tuple[str, tuple[int, ...]]) -> None:
    site = scan(network(), [IMAGE]).site(name)
    chain = scratch_chain(site, Pick(*pick, 0), generator(0, 11, 2))
    loud = torch.linalg.vector_norm(torch.from_numpy(compose(chain.stages)))
    assert float(loud) == pytest.approx(float(torch.linalg.vector_norm(torch.from_numpy(site.stage.weight))), rel=1e-6)
    for factor in outer_factors(ChainLayer(chain)):
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]), rtol=0, atol=1e-5)
    # white noise leaves with the same power, up to what few channels and 4,000 samples scatter
    noise = torch.randn(64, *site.input_shape[1:], generator=torch.Generator().manual_seed(6))
    powers = [ChainLayer(c)(noise).detach().square().mean() for c in (chain, type(chain)((site.stage,)))]
    assert float(powers[0] / powers[1]) == pytest.approx(1.0, abs=0.25)
    again = scratch_chain(site, Pick(*pick, 0), generator(0, 11, 2))
    assert all((a.weight == b.weight).all() for a, b in zip(chain, again, strict=True))


def test_given_ranks_are_checked_against_their_layers() -> None:
    sites = scan(network(), [IMAGE]).sites
    found = given_ranks(sites, {"1": ("tucker2", (8, 12)), "4": ("dense", ())})
    assert found["1"].macs == 64 * 8 * 8 + 16 * (8 * 12 * 9 + 12 * 12)
    assert found["4"].macs == site_macs(sites[2])
    for wrong, message in (
        ({"9": ("svd", (1,))}, "'9' is no layer to factorize; there are 0, 1, 4"),
        ({"4": ("tucker2", (1, 1))}, "4 cannot be written as 'tucker2'"),
        ({"1": ("tt", (1, 1))}, "1 cannot be written as 'tt'"),
        ({"1": ("tucker2", (9, 1))}, r"1 as tucker2 takes a rank from \(1, 1\) to \(8, 12\), not \(9, 1\)"),
        ({"1": ("tucker2", (1,))}, r"not \(1,\)"),
    ):
        with pytest.raises(UsageError, match=message):
            given_ranks(sites, wrong)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 0"):
        Elrt(-1.0)


def test_training_needs_no_chain(  # a network with none has a penalty of zero and trains like a dense one
) -> None:
    net = nn.Linear(3, 2)
    batch: dict[str, Tensor] = {"x": torch.ones(1, 3), "labels": torch.tensor([0])}
    torch.testing.assert_close(Elrt()(net, batch, 0, 1), F.cross_entropy(net(batch["x"]), batch["labels"]))
