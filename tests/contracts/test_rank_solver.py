"""What every solver must do, against brute force: passes.ranks.problem.RankSolver for each registered one.

A solver that looks at the network (passes.ranks.context.SearchingSolver) gets one of random linear layers, whose sites
and options are those of the problem, and no time: it must keep the same promises with what it knows at once. What
its time is worth is for its own tests.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.ranks.problem import Option, RankPlan, RankProblem, SiteOptions
from passes.registry import SOLVERS
from tests.search_contexts import linear_context


@st.composite
def problems(draw: st.DrawFn) -> RankProblem:
    """Up to 4 sites of up to 4 options with two budgets, some of them out of reach."""
    number = st.integers(1, 50).map(float)
    sites = []
    for s in range(draw(st.integers(1, 4))):
        dense = Option("dense", (), {"latency": draw(number) + 50, "energy": draw(number) + 50}, 0.0)
        options = [dense]
        for r in range(draw(st.integers(0, 3))):
            costs = {"latency": draw(number), "energy": draw(number)}
            options.append(Option("svd", (r + 1,), costs, draw(number) / 50))
        sites.append(SiteOptions(f"site{s}", tuple(options)))
    fixed = {"latency": draw(number), "energy": draw(number)}
    dense_total = {m: sum(s.options[0].costs[m] for s in sites) + fixed[m] for m in fixed}
    share = st.floats(0.05, 1.1)
    budgets = {"latency": dense_total["latency"] * draw(share)}
    if draw(st.booleans()):
        budgets["energy"] = dense_total["energy"] * draw(share)
    return RankProblem(tuple(sites), fixed, budgets)


def plans(problem: RankProblem) -> list[tuple[int, ...]]:
    return list(product(*(range(len(site.options)) for site in problem.sites)))


def meets(problem: RankProblem, picks: tuple[int, ...]) -> bool:
    return all(problem.total(picks, m) <= limit * (1 + 1e-9) for m, limit in problem.budgets.items())


def run(name: str, problem: RankProblem) -> RankPlan:
    solver: Any = SOLVERS.load(name)
    found: RankPlan = (
        solver.solve(problem)
        if hasattr(solver, "solve")
        else solver.search(problem, linear_context(problem), time_limit_s=0.0)
    )
    return found


@pytest.mark.parametrize("name", SOLVERS.builtin)
@given(problem=problems())
def test_a_plan_keeps_every_budget_or_says_that_it_does_not(name: str, problem: RankProblem) -> None:
    plan = run(name, problem)
    assert plan.solver == name and plan.problem == problem.digest()
    assert len(plan.picks) == len(problem.sites)
    assert all(0 <= pick < len(site.options) for pick, site in zip(plan.picks, problem.sites, strict=True))
    assert plan.status in {"optimal", "feasible", "infeasible"}
    assert meets(problem, plan.picks) == (plan.status != "infeasible")


@pytest.mark.parametrize("name", SOLVERS.builtin)
@given(problem=problems())
def test_nothing_beats_the_bound(name: str, problem: RankProblem) -> None:
    plan = run(name, problem)
    assert plan.objective == pytest.approx(problem.total(plan.picks, "error"), rel=1e-9, abs=1e-12)
    best = min((problem.total(p, "error") for p in plans(problem) if meets(problem, p)), default=None)
    if best is not None and plan.status != "infeasible":
        assert plan.bound <= best * (1 + 1e-9) + 1e-9
        assert plan.objective >= best * (1 - 1e-9) - 1e-9
        if plan.status == "optimal":
            assert plan.objective <= best * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("name", SOLVERS.builtin)
@given(problem=problems())
def test_a_budget_out_of_reach_comes_with_the_least_value(name: str, problem: RankProblem) -> None:
    plan = run(name, problem)
    least = {m: min(problem.total(p, m) for p in plans(problem)) for m in problem.budgets}
    missed = {m: pytest.approx(v) for m, v in least.items() if v > problem.budgets[m]}
    assert plan.out_of_reach == missed


@pytest.mark.parametrize("name", SOLVERS.builtin)
@given(problem=problems())
def test_a_solver_is_pure(name: str, problem: RankProblem) -> None:
    digest = problem.digest()
    first, second = (run(name, problem) for _ in range(2))
    assert first == second and problem.digest() == digest
    assert [len(row) for row in first.preferences] in ([], [len(site.options) for site in problem.sites])
