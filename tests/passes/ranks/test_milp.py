"""The exact solver against enumeration, beyond what every solver is held to in tests/contracts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from passes.ranks.milp import MilpSolver, least
from passes.ranks.problem import Option, RankProblem, SiteOptions

METRICS = ("latency", "energy", "size")
SCALES = {"latency": 1e5, "energy": 1e10, "size": 1e3}  # cycles, picojoules, bytes: the metrics are far apart


def with_budgets(problem: RankProblem, **budgets: float) -> RankProblem:
    """The same problem under other limits."""
    return replace(problem, budgets={**problem.budgets, **budgets})


def random_problem(rng: np.random.Generator, sites: int, choices: int, shares: dict[str, float]) -> RankProblem:
    """Options that lose more the cheaper they are, with noise; budgets as shares of the dense network's cost."""
    built = []
    for s in range(sites):
        weight = rng.uniform(0.2, 2)
        options = []
        for c in range(choices):
            share = 1 - c / choices
            costs = {m: float(SCALES[m] * weight * share * rng.uniform(0.8, 1.2)) for m in METRICS}
            error = 0.0 if c == 0 else float(weight * (1 - share) ** 2 * rng.uniform(0.5, 1.5))
            options.append(Option("dense" if c == 0 else "svd", () if c == 0 else (choices - c,), costs, error))
        built.append(SiteOptions(f"s{s}", tuple(options)))
    fixed = {m: float(SCALES[m] * rng.uniform(0, 1)) for m in METRICS}
    problem = RankProblem(tuple(built), fixed, {})
    dense = (0,) * sites
    return replace(problem, budgets={m: share * problem.total(dense, m) for m, share in shares.items()})


def everything(problem: RankProblem) -> list[tuple[int, ...]]:
    return list(product(*(range(len(s.options)) for s in problem.sites)))


def meets(problem: RankProblem, picks: tuple[int, ...]) -> bool:
    return all(problem.total(picks, m) <= limit * (1 + 1e-12) for m, limit in problem.budgets.items())


@given(
    seed=st.integers(0, 2**32 - 1),
    shares=st.dictionaries(st.sampled_from(METRICS), st.floats(0.3, 1.05), min_size=1),
)
def test_the_plan_is_the_best_of_all_plans(seed: int, shares: dict[str, float]) -> None:
    problem = random_problem(np.random.default_rng(seed), 4, 4, shares)
    plan = MilpSolver(gap=0.0).solve(problem)
    best = min((problem.total(p, "error") for p in everything(problem) if meets(problem, p)), default=None)
    if best is None:
        assert plan.status == "infeasible"
        return
    assert plan.status == "optimal"
    assert meets(problem, plan.picks)
    assert plan.objective == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert plan.gap == pytest.approx(0.0, abs=1e-6)


@given(seed=st.integers(0, 2**32 - 1), limit=st.floats(0.0, 3.0), energy=st.floats(0.4, 1.1))
def test_the_fastest_plan_within_an_error(seed: int, limit: float, energy: float) -> None:
    base = random_problem(np.random.default_rng(seed), 4, 4, {"energy": energy})
    problem = replace(base, objective="latency", error_limit=limit)
    plan = MilpSolver(gap=0.0).solve(problem)
    allowed = [p for p in everything(problem) if problem.total(p, "error") <= limit + 1e-12 and meets(problem, p)]
    if not allowed:
        assert plan.status == "infeasible"
        return
    best = min(problem.total(p, "latency") for p in allowed)
    assert plan.status == "optimal"
    assert plan.picks in allowed
    assert plan.objective == pytest.approx(best, rel=1e-6)
    assert plan.objective == pytest.approx(problem.total(plan.picks, "latency"), rel=1e-12)
    assert plan.bound <= best * (1 + 1e-9)


@given(
    seed=st.integers(0, 2**32 - 1),
    shares=st.dictionaries(st.sampled_from(METRICS), st.floats(0.01, 0.35), min_size=1),
)
def test_a_miss_is_the_least_summed_excess_and_then_the_least_error(seed: int, shares: dict[str, float]) -> None:
    problem = random_problem(np.random.default_rng(seed), 4, 4, shares)

    def excess(picks: tuple[int, ...]) -> float:
        return sum(max(problem.total(picks, m) / limit - 1, 0.0) for m, limit in problem.budgets.items())

    plan = MilpSolver(gap=0.0).solve(problem)
    plans = everything(problem)
    if any(excess(p) == 0 for p in plans):
        assert plan.status == "optimal"
        return
    assert plan.status == "infeasible"
    smallest = min(excess(p) for p in plans)
    # the sites' part of a budget is what is solved for, so the tolerance is relative to the whole excess
    assert excess(plan.picks) == pytest.approx(smallest, rel=1e-4)
    tied = [p for p in plans if excess(p) <= smallest * (1 + 1e-9)]
    assert plan.objective <= min(problem.total(p, "error") for p in tied) * (1 + 1e-6)
    reach = {m: min(problem.total(p, m) for p in plans) for m in problem.budgets}
    assert plan.out_of_reach == {m: pytest.approx(v) for m, v in reach.items() if v > problem.budgets[m]}


@pytest.mark.parametrize("share", [1e-9, 1e-8, 1e-7])
def test_a_budget_is_not_missed_by_the_tolerance_of_the_solver(share: float) -> None:
    for seed in range(20):
        problem = random_problem(np.random.default_rng(seed), 4, 4, {"latency": 0.6})
        at = problem.total(MilpSolver().solve(problem).picks, "latency")
        exactly = MilpSolver().solve(with_budgets(problem, latency=at))
        assert problem.total(exactly.picks, "latency") == at
        tight = with_budgets(problem, latency=at * (1 - share))  # now that plan is out, by less than HiGHS can see
        plan = MilpSolver().solve(tight)
        allowed = [p for p in everything(tight) if meets(tight, p)]
        assert plan.picks in allowed
        assert plan.objective == pytest.approx(min(tight.total(p, "error") for p in allowed), rel=1e-4)
        assert plan.bound <= plan.objective


def test_budgets_that_only_clash_together_are_each_in_reach() -> None:
    # one option is fast, the other small: either budget can be met, both cannot
    fast = Option("svd", (1,), {"latency": 1.0, "size": 9.0}, 0.3)
    small = Option("svd", (2,), {"latency": 9.0, "size": 1.0}, 0.2)
    dense = Option("dense", (), {"latency": 10.0, "size": 10.0}, 0.0)
    problem = RankProblem((SiteOptions("s", (dense, fast, small)),), {}, {"latency": 2.0, "size": 5.0})
    plan = MilpSolver().solve(problem)
    assert plan.status == "infeasible" and plan.out_of_reach == {}
    assert plan.picks == (1,)  # 9/5 - 1 = 0.8 over, against 9/2 - 1 = 3.5


def test_what_is_fixed_counts_against_a_budget() -> None:
    dense = Option("dense", (), {"latency": 10.0}, 0.0)
    half = Option("svd", (1,), {"latency": 5.0}, 1.0)
    problem = RankProblem((SiteOptions("s", (dense, half)),), {"latency": 3.0}, {"latency": 13.0})
    assert MilpSolver().solve(problem).picks == (0,)
    assert MilpSolver().solve(with_budgets(problem, latency=12.9)).picks == (1,)
    assert least(problem, "latency") == 8.0
    assert MilpSolver().solve(with_budgets(problem, latency=7.5)).out_of_reach == {"latency": 8.0}


def test_a_budget_that_the_dense_network_meets_changes_nothing() -> None:
    problem = random_problem(np.random.default_rng(0), 6, 5, dict.fromkeys(METRICS, 1.0))
    plan = MilpSolver().solve(problem)
    assert plan.picks == (0,) * 6 and plan.objective == 0.0 and plan.gap == 0.0


def test_a_network_without_sites() -> None:
    problem = RankProblem((), {"latency": 3.0}, {"latency": 4.0})
    plan = MilpSolver().solve(problem)
    assert (plan.status, plan.picks, plan.objective) == ("optimal", (), 0.0)
    missed = MilpSolver().solve(with_budgets(problem, latency=2.0))
    assert missed.status == "infeasible" and missed.out_of_reach == {"latency": 3.0}


def test_a_looser_budget_never_costs_error() -> None:
    problem = random_problem(np.random.default_rng(1), 12, 8, {"latency": 0.5, "energy": 0.7})
    limit = problem.budgets["latency"]
    errors = [MilpSolver().solve(with_budgets(problem, latency=limit * f)).objective for f in (0.9, 1.0, 1.2, 1.5)]
    assert all(b <= a * (1 + 1e-4) for a, b in pairwise(errors))
    assert errors[0] > errors[-1]


@pytest.mark.slow
def test_a_network_of_160_sites_is_solved_to_a_proven_gap() -> None:
    problem = random_problem(np.random.default_rng(2), 160, 64, {"latency": 0.5, "energy": 0.52, "size": 0.55})
    plan = MilpSolver(gap=5e-5).solve(problem)
    assert plan.status == "optimal"
    assert meets(problem, plan.picks)
    assert 0 <= plan.gap < 1e-4
    # a multiple-choice knapsack with 3 budgets leaves at most 3 of its sites fractional, so the linear relaxation,
    # written out here by hand, is a close lower bound: none of the proof is the solver's own
    costs = np.array([[[o.costs[m] for o in s.options] for s in problem.sites] for m in METRICS]).reshape(3, -1)
    limits = np.array([problem.budgets[m] - problem.fixed[m] for m in METRICS])
    errors = np.array([o.error for s in problem.sites for o in s.options])
    one_each = np.kron(np.eye(160), np.ones(64))
    relaxed = linprog(errors, costs / limits[:, None], np.ones(3), one_each, np.ones(160), (0, 1)).fun
    assert relaxed <= plan.bound * (1 + 1e-9)
    assert plan.objective <= relaxed * 1.01
