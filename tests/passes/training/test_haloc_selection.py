"""Choice by gradient: the estimator against enumeration, the prior, the temperature, the multipliers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from passes.ranks.problem import Option, RankProblem, SiteOptions
from passes.training.haloc import HalocOptions
from passes.training.haloc_selection import Multipliers, Selection, penalised, second_order

Tensor = torch.Tensor


def random_problem(sites: int = 6, options: int = 5, share: float = 0.5, seed: int = 0) -> RankProblem:
    """Costs and errors that fall and rise along the options; the budgets are a share of the dense costs."""
    rng = np.random.default_rng(seed)
    found = []
    for s in range(sites):
        costs = np.sort(rng.uniform(1, 10, options))[::-1]
        errors = np.concatenate([[0.0], np.sort(rng.uniform(0, 1, options - 1))])
        rows = [
            Option("dense" if not k else "svd", (options - k,) if k else (), {"latency": c, "macs": c * c}, e)
            for k, (c, e) in enumerate(zip(costs.tolist(), errors.tolist(), strict=True))
        ]
        found.append(SiteOptions(f"s{s}", tuple(rows)))
    fixed = {"latency": 3.0, "macs": 5.0}
    dense = {m: sum(s.options[0].costs[m] for s in found) + fixed[m] for m in fixed}
    return RankProblem(tuple(found), fixed, {m: share * value for m, value in dense.items()})


def quadratic(seed: int, sites: int, options: int) -> tuple[Tensor, Tensor]:
    """A loss of the choice d (sites x options): d' A d + b' d."""
    rng = np.random.default_rng(seed)
    size = sites * options
    return torch.tensor(rng.standard_normal((size, size))), torch.tensor(rng.standard_normal(size))


def loss_of(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    flat = d.reshape(-1)
    return flat @ a @ flat + b @ flat


def draws(sites: int, options: int) -> list[Tensor]:
    eye = torch.eye(options, dtype=torch.float64)
    return [eye[list(picks)] for picks in product(range(options), repeat=sites)]


@pytest.mark.parametrize("seed", range(3))
def test_the_estimator_is_the_gradient_of_the_expected_loss_where_the_loss_is_quadratic(seed: int) -> None:
    """Both are enumerated over all choices of two sites: no sampling, so they agree to rounding."""
    sites, options = 2, 4
    a, b = quadratic(seed, sites, options)
    scores = torch.tensor(np.random.default_rng(seed).standard_normal((sites, options)), requires_grad=True)
    p = scores.softmax(1)
    exact, estimate, straight = torch.zeros(()), torch.zeros_like(scores), torch.zeros_like(scores)
    for d in draws(sites, options):
        chance = (p * d).sum(1).prod()
        exact = exact + chance * loss_of(d, a, b)
        (one,) = torch.autograd.grad(loss_of(second_order(scores, d), a, b), [scores])
        estimate = estimate + chance.detach() * one
        plain = d + scores.softmax(1) - scores.softmax(1).detach()
        (one,) = torch.autograd.grad(loss_of(plain, a, b), [scores])
        straight = straight + chance.detach() * one
    (wanted,) = torch.autograd.grad(exact, [scores])
    torch.testing.assert_close(estimate, wanted, rtol=1e-9, atol=1e-9)
    assert float((straight - wanted).norm() / wanted.norm()) > 0.1, "which the plain estimator is not"


def test_its_value_is_the_drawn_choice_to_the_last_bit() -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    drawn = torch.eye(5)[[4, 0, 2]]
    assert torch.equal(second_order(scores, drawn), drawn)


def test_straight_through_would_call_a_smaller_rank_free() -> None:
    """A quadratic loss of nested slices W_k = sum of the first k of orthogonal directions of weight s.

    E[L] falls by s_k^2 / 2 with each rank. At the drawn slice the first-order change of a cut is zero; the second-order
    estimate over all draws is the true gradient.
    """
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    slices = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.float64) * s

    def loss(d: Tensor) -> Tensor:
        return 0.5 * (s - (d @ slices)[0]).square().sum()

    full = torch.eye(4, dtype=torch.float64)[[3]].requires_grad_()
    (slope,) = torch.autograd.grad(loss(full), [full])
    assert not slope.any()
    scores = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    found = torch.zeros_like(scores)
    for d in draws(1, 4):
        found = found + torch.autograd.grad(loss(second_order(scores, d)), [scores])[0] / 4
    losses = torch.tensor([float(loss(d)) for d in draws(1, 4)], dtype=torch.float64)
    wanted = (losses - losses.mean()) / 4
    torch.testing.assert_close(found[0], wanted, rtol=1e-9, atol=1e-9)


def test_the_temperature_falls_geometrically_from_5_to_a_tenth() -> None:
    options = HalocOptions()
    found = [options.temperature(x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(found, [5.0, 5 * 50**-0.25, 5 * 50**-0.5, 5 * 50**-0.75, 0.1], rtol=1e-12)
    assert options.temperature(2.0) == options.cold == 0.1


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    selection = Selection(random_problem(), breadth=3.0)
    with torch.no_grad():
        selection.theta += torch.randn(selection.theta.shape, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    count = 4000
    found = torch.stack([selection.draw(0.7, generator) for _ in range(count)])
    p = selection.probabilities(0.7).detach()
    assert bool((found.sum(2) == 1).all())
    deviation = (found.mean(0) - p).abs() / (p * (1 - p) / count).sqrt().clamp_min(1e-9)
    assert float(deviation.max()) < 5, "within five standard deviations of a binomial"
    again = torch.Generator().manual_seed(0)
    assert torch.equal(found[0], selection.draw(0.7, again)) and torch.equal(found[1], selection.draw(0.7, again))


def test_a_cold_distribution_has_decided() -> None:
    selection = Selection(random_problem(), breadth=3.0)
    with torch.no_grad():
        selection.theta += torch.arange(5.0)
    cold, hot = (selection.probabilities(t).detach().max(1).values for t in (0.1, 5.0))
    assert float(cold.min()) > 0.99 and float(hot.max()) < 0.9


@pytest.mark.parametrize("breadth", [2.0, 4.0])
def test_the_prior_keeps_the_budgets_on_average_and_leaves_so_many_candidates_open(breadth: float) -> None:
    problem = random_problem(sites=12, options=8, share=0.6)
    selection = Selection(problem, breadth)
    p = selection.probabilities(5.0).detach().double()
    for metric, ratio in selection.excess(p.float()).items():
        costs = sum(
            float(row[: len(site.options)] @ torch.tensor([o.costs[metric] for o in site.options]).double())
            for row, site in zip(p, problem.sites, strict=True)
        )
        assert float(ratio) == pytest.approx((costs + problem.fixed[metric]) / problem.budgets[metric], rel=1e-5)
        assert float(ratio) <= 1 + 1e-4
    entropy = -(p * p.clamp_min(1e-30).log()).sum(1).mean()
    assert float(entropy.exp()) == pytest.approx(breadth, rel=0.02)


def test_sites_of_different_length_choose_among_their_own_options() -> None:
    problem = random_problem(sites=3, options=5)
    sites = (problem.sites[0], SiteOptions("short", problem.sites[1].options[:2]), problem.sites[2])
    selection = Selection(RankProblem(sites, problem.fixed, problem.budgets), breadth=2.0)
    generator = torch.Generator().manual_seed(0)
    assert all(not selection.draw(5.0, generator)[1, 2:].any() for _ in range(100))
    assert [len(row) for row in selection.preferences(0.1)] == [5, 2, 5]
    for row in selection.preferences(1.0):
        assert np.exp(-row).sum() == pytest.approx(1.0, rel=1e-6)


def test_the_published_factor_applies_where_a_budget_is_exceeded() -> None:
    loss = torch.tensor(2.0)
    over, under = torch.tensor(1.21), torch.tensor(0.8)
    assert float(penalised(loss, [over, under], 1.5)) == pytest.approx(2.0 * 1.1**3, rel=1e-6)
    assert float(penalised(loss, [under, under], 1.5)) == 2.0


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_multipliers_make_a_budget_hold_whatever_it_was_thought_to_be_worth(scale: float) -> None:
    """min E[error] within E[cost] <= budget on two options: all mass would go to the dear one without a price."""
    dense, small = Option("dense", (), {"latency": 10.0}, 0.0), Option("svd", (1,), {"latency": 2.0}, 1.0)
    problem = RankProblem((SiteOptions("a", (dense, small)),), {}, {"latency": 6.0})
    selection = Selection(problem, breadth=1.9)
    multipliers = Multipliers(["latency"], scale, damping=20.0, rate=1.0)
    optimizer = torch.optim.AdamW([selection.theta], 1e-2)
    for _ in range(600):
        p = selection.probabilities(1.0)
        excess = selection.excess(p)
        loss = p[0, 1] + multipliers.penalty(excess, 1.0)
        (selection.theta.grad,) = torch.autograd.grad(loss, [selection.theta])
        optimizer.step()
        multipliers.step(excess)
    cost = float((p[0].detach() * torch.tensor([10.0, 2.0])).sum())
    assert cost == pytest.approx(6.0, rel=0.02), "used up and kept"
    # where the budget is just kept, its price is the slope of the error in the cost: 1 for 8, in units of the budget
    assert multipliers.values["latency"] == pytest.approx(6.0 / 8.0, rel=0.15)
