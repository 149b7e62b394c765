from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.ranks.milp import MilpSolver
from passes.ranks.problem import Option, RankPlan, RankProblem, SiteOptions, as_json, undominated

METRICS = ("latency", "size")
options = st.lists(
    st.builds(
        lambda a, b, e: Option("svd", (1,), {"latency": float(a), "size": float(b)}, float(e)),
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(0, 4),
    ),
    max_size=14,
)


def values(option: Option) -> tuple[float, ...]:
    return (*(option.costs[m] for m in METRICS), option.error)


@given(found=options)
def test_exactly_the_undominated_options_stay(found: list[Option]) -> None:
    wanted = []
    for index, option in enumerate(found):
        others = [o for i, o in enumerate(found) if i != index]
        beaten = any(
            all(x <= y for x, y in zip(values(o), values(option), strict=True)) and values(o) != values(option)
            for o in others
        )
        twin_before = any(values(o) == values(option) for o in found[:index])
        if not beaten and not twin_before:
            wanted.append(option)
    kept = undominated(found, METRICS)
    assert len(kept) == len(wanted) and all(a is b for a, b in zip(kept, wanted, strict=True))


def test_dropping_dominated_options_changes_no_optimum() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sites = tuple(
            SiteOptions(
                f"s{s}",
                tuple(
                    Option("svd", (c,), {m: float(rng.integers(1, 20)) for m in METRICS}, float(rng.integers(0, 9)))
                    for c in range(6)
                ),
            )
            for s in range(4)
        )
        problem = RankProblem(sites, {}, {"latency": 40.0, "size": 45.0})
        thinned = replace(
            problem, sites=tuple(replace(s, options=tuple(undominated(list(s.options), METRICS))) for s in sites)
        )
        full, thin = MilpSolver(gap=0.0).solve(problem), MilpSolver(gap=0.0).solve(thinned)
        assert full.status == thin.status
        assert thin.objective == pytest.approx(full.objective)


def test_totals_add_what_is_fixed() -> None:
    site = SiteOptions("s", (Option("dense", (), {"latency": 4.0}, 0.0), Option("svd", (1,), {"latency": 1.0}, 0.5)))
    problem = RankProblem((site, replace(site, site="t")), {"latency": 3.0}, {})
    assert problem.total((0, 1), "latency") == 8.0
    assert problem.total((0, 1), "error") == 0.5


def test_a_digest_sees_everything_that_a_solver_sees() -> None:
    site = SiteOptions("s", (Option("dense", (), {"latency": 4.0}, 0.0),))
    base = RankProblem((site,), {"latency": 1.0}, {"latency": 3.0})
    changed = [
        replace(base, sites=(replace(site, site="t"),)),
        replace(base, sites=(SiteOptions("s", (Option("dense", (), {"latency": 5.0}, 0.0),)),)),
        replace(base, sites=(SiteOptions("s", (Option("dense", (), {"latency": 4.0}, 0.1),)),)),
        replace(base, fixed={}),
        replace(base, budgets={"latency": 4.0}),
        replace(base, objective="latency"),
        replace(base, error_limit=1.0),
    ]
    digests = {p.digest() for p in (base, *changed)}
    assert len(digests) == 1 + len(changed)
    assert replace(base, budgets=dict(base.budgets)).digest() == base.digest()


def test_the_gap_is_relative_to_the_objective() -> None:
    plan = RankPlan("milp", "feasible", (), 4.0, 3.0, "")
    assert plan.gap == 0.25
    assert replace(plan, bound=4.5).gap == 0.0


def test_a_plan_as_json() -> None:
    plan = RankPlan("milp", "optimal", (1,), 0.5, 0.25, "digest")
    layers = [{"name": "s", "choice": "tucker2", "rank": [3, 4]}]
    written = as_json(plan, layers)
    assert written["layers"] == layers
    assert (written["status"], written["problem"], written["gap"]) == ("optimal", "digest", 0.5)
