"""The solver's benchmark: its problems are what they say, and its numbers are those of the plan."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.bench.solver import METRICS, Solver, random_problem
from codegen.events import QuietEvents
from passes.ranks.problem import RankProblem


@pytest.fixture
def problem() -> RankProblem:
    return random_problem(np.random.default_rng(3), sites=7, choices=64, level=0.6)


def test_the_problem_has_the_asked_size(problem: RankProblem) -> None:
    assert [len(s.options) for s in problem.sites] == [64] * 7
    assert tuple(problem.budgets) == METRICS


def test_errors_fall_and_costs_climb_in_steps(problem: RankProblem) -> None:
    for site in problem.sites:
        dense, *chains = site.options
        assert dense.format == "dense" and dense.error == 0
        assert all(c.error > 0 and c.costs["latency"] < dense.costs["latency"] for c in chains)
        for kind in ("svd", "tucker2"):
            latency = [c.costs["latency"] for c in chains if c.format == kind]
            assert [c.rank for c in chains if c.format == kind] == [(r,) for r in range(1, len(latency) + 1)]
            assert latency == sorted(latency)
            assert len(set(np.round(latency, 6))) < len(latency)  # several ranks to a step


def test_the_budgets_bind(problem: RankProblem) -> None:
    assert all(problem.total((0,) * 7, m) > limit for m, limit in problem.budgets.items())


def test_the_same_seed_gives_the_same_problem(problem: RankProblem) -> None:
    again = random_problem(np.random.default_rng(3), sites=7, choices=64, level=0.6)
    assert again.digest() == problem.digest()


def test_it_reports_a_proven_gap_and_agrees_with_brute_force() -> None:
    result = Solver(sites=12, choices=9, problems=2, small=6).run(QuietEvents())
    assert result["small"] == {"problems": 6, "equal_to_brute_force": 6, "relative_tolerance": 1e-5}
    for row in result["rows"]:
        assert row["budgets_met"] and row["status"] == "optimal"
        assert 0 <= row["objective"] - row["bound"] <= 1e-4 * row["objective"]
