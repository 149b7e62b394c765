from __future__ import annotations

import numpy as np
import pytest

from passes.ranks.milp import MilpSolver
from passes.ranks.problem import Option, RankProblem, SiteOptions
from passes.ranks.uniform import UniformSolver
from tests.passes.ranks.test_milp import random_problem


def test_it_takes_the_largest_fraction_that_keeps_the_budgets() -> None:
    def options(size: float) -> SiteOptions:
        costs = [("dense", 1.0, 0.0), ("svd", 0.75, 0.1), ("svd", 0.5, 0.2), ("svd", 0.25, 0.4)]
        return SiteOptions(f"s{size}", tuple(Option(n, (), {"macs": size * f}, e) for n, f, e in costs))

    sites = (options(100.0), options(40.0))
    # 140 dense: 0.75 of it is 105, 0.5 is 70
    for limit, pick in ((140.0, 0), (139.0, 1), (105.0, 1), (104.0, 2), (70.0, 2), (69.0, 3), (35.0, 3)):
        plan = UniformSolver().solve(RankProblem(sites, {}, {"macs": limit}))
        assert plan.picks == (pick, pick) and plan.status == "feasible"
    plan = UniformSolver().solve(RankProblem(sites, {"macs": 5.0}, {"macs": 35.0}))
    assert plan.status == "infeasible" and plan.out_of_reach == {"macs": 40.0}


def test_every_site_is_within_the_fraction_and_a_larger_one_would_not_do() -> None:
    for seed in range(10):
        problem = random_problem(np.random.default_rng(seed), 6, 8, {"latency": 0.6, "energy": 0.7})
        plan = UniformSolver().solve(problem)
        assert plan.status == "feasible"
        assert all(problem.total(plan.picks, m) <= limit for m, limit in problem.budgets.items())
        dense = [s.options[0].costs["latency"] for s in problem.sites]
        taken = [s.options[p].costs["latency"] / d for s, p, d in zip(problem.sites, plan.picks, dense, strict=True)]
        for fraction in np.unique(
            [o.costs["latency"] / d for s, d in zip(problem.sites, dense, strict=True) for o in s.options]
        ):
            if fraction <= max(taken) * (1 + 1e-9):
                continue
            picks = []
            for site, d in zip(problem.sites, dense, strict=True):
                inside = [i for i, o in enumerate(site.options) if o.costs["latency"] <= fraction * d * (1 + 1e-9)]
                picks.append(min(inside, key=lambda i: site.options[i].error) if inside else None)
            if None in picks:
                continue
            same = tuple(picks) == plan.picks
            broken = any(problem.total(tuple(picks), m) > limit for m, limit in problem.budgets.items())
            assert same or broken


def test_the_exact_solver_is_never_worse() -> None:
    for seed in range(10):
        problem = random_problem(np.random.default_rng(seed), 6, 8, {"latency": 0.6})
        assert MilpSolver().solve(problem).objective <= UniformSolver().solve(problem).objective * (1 + 1e-4)


def test_without_a_budget_there_is_nothing_to_be_uniform_about() -> None:
    with pytest.raises(ValueError, match="budget"):
        UniformSolver().solve(RankProblem((), {}, {}))
