"""Prices refined where plans depend on them, on a made-up processor: what is measured, how often, and to what end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codegen.cpu_latency import CALL_S, CpuLatency
from codegen.events import QuietEvents
from codegen.memory import Forgetful
from codegen.plan_search import formats_named
from codegen.refinement import TUNING_EFFORTS, Refinement, worth_of_latency
from codegen.search import affordable
from codegen.space import EFFORTS, Selection, Space, build_space
from passes.core.cost import Kind, StageWork
from passes.onnx_graph import OnnxGraph
from passes.ranks.milp import MilpSolver
from passes.ranks.problem import Option, RankProblem, SiteOptions
from tests.codegen.made_up_trials import DEVICE, MadeUpTrials

DIGITS = Path(__file__).parents[2] / "examples" / "digits.onnx"
EFFORT = TUNING_EFFORTS["default"]


def truth_s(work: StageWork) -> float:
    """Fast where output channels fill tiles of eight, slow elsewhere: what the prior knows nothing of."""
    filled = -(-work.out_channels // 8) * 8 / work.out_channels
    return 2 * work.macs * filled / 60e9 + 8e-7


def space_of(trials: MadeUpTrials) -> Space:
    effort = EFFORTS["quick"]
    graph = OnnxGraph.read(DIGITS)
    prices = CpuLatency(DEVICE, trials)
    prices.measure([o.stage for o in graph.workload() if o.stage is not None], QuietEvents())
    trials.rounds.clear()
    formats = formats_named((), QuietEvents())
    space = build_space(
        graph, prices, formats, Selection(), None, None, effort, effort.correction(0), QuietEvents(), memory=Forgetful()
    )
    return space


def refined(space: Space, share: float, effort: str = "default") -> tuple[Refinement, dict[str, float]]:
    refinement = Refinement(TUNING_EFFORTS[effort], lambda: False, QuietEvents())
    return refinement, {"latency": share * space.baseline.latency}


def best_possible(share: float) -> float:
    """The least error within the budget when every candidate's price is the truth."""
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    works = {
        stage for s in space.scored for c in space.scored[s].candidates for stage in space.works(s, c.name, c.rank)
    }
    assert isinstance(space.model, CpuLatency)
    space.model.measure(list(works), QuietEvents())
    space.reprice()
    problem = space.problem({"latency": share * space.baseline.latency}, {})
    return MilpSolver().solve(problem).objective


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7])
def test_the_plan_is_measured_and_nearly_the_best_there_is(share: float) -> None:
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    refinement, budgets = refined(space, share)
    attempt, trace = affordable(space, MilpSolver(), budgets, {}, EFFORTS["quick"], refinement)
    assert trace[-1]["met"]
    chosen = [
        space.candidate(s.site, s.options[p].format, s.options[p].rank)
        for s, p in zip(attempt.problem.sites, attempt.plan.picks, strict=True)
    ]
    assert all(candidate.cost.kind is Kind.MEASURED for candidate in chosen)
    true_s = space.baseline.latency + sum(
        sum(truth_s(w) for w in space.works(s.site, c.name, c.rank)) - truth_s(space.works(s.site, "dense", ())[0])
        for s, c in zip(attempt.problem.sites, chosen, strict=True)
    )
    stages = sum(
        len(space.works(s.site, c.name, c.rank)) - 1 for s, c in zip(attempt.problem.sites, chosen, strict=True)
    )
    assert attempt.cost.latency == pytest.approx(true_s + CALL_S * stages, rel=1e-9)  # each further stage is a call
    # the gap is to what predictions promise, and those of this staircase may promise too little
    assert attempt.plan.objective <= best_possible(share) * (1 + 2 * EFFORT.gap)


def test_only_a_part_of_the_candidates_is_measured() -> None:
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    works = {
        replace(stage, bias=True)
        for s in space.scored
        for c in space.scored[s].candidates
        for stage in space.works(s, c.name, c.rank)
    }
    refinement, budgets = refined(space, 0.5)
    affordable(space, MilpSolver(), budgets, {}, EFFORTS["quick"], refinement)
    measured = {w for each in trials.rounds for w in each}
    assert 0 < len(measured) < len(works) / 2
    assert refinement.stages == len(measured) == sum(len(each) for each in trials.rounds)


def test_a_second_search_needs_no_trial_and_finds_the_same() -> None:
    first = MadeUpTrials(truth_s)
    space = space_of(first)
    refinement, budgets = refined(space, 0.5)
    plan = affordable(space, MilpSolver(), budgets, {}, EFFORTS["quick"], refinement)[0]
    second = MadeUpTrials(truth_s, first.times)
    again = space_of(second)
    refinement, budgets = refined(again, 0.5)
    repeated = affordable(again, MilpSolver(), budgets, {}, EFFORTS["quick"], refinement)[0]
    assert second.rounds == []
    assert repeated.choices == plan.choices and repeated.problem.digest() == plan.problem.digest()


def test_another_weighting_is_refined_from_where_the_first_one_ended() -> None:
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    refinement, budgets = refined(space, 0.5)
    affordable(space, MilpSolver(), budgets, {}, EFFORTS["quick"], refinement)
    before = len(trials.times)
    weights = {site.name: 1.2 if index % 2 else 0.8 for index, site in enumerate(space.sites)}
    affordable(space, MilpSolver(), budgets, weights, EFFORTS["quick"], refinement)
    assert len(trials.times) - before < before / 2


def test_repricing_changes_prices_and_nothing_else() -> None:
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    before = space.problem({}, {})
    site = max(space.sites, key=lambda s: len(space.scored[s.name].candidates))
    candidate = space.scored[site.name].candidates[-1]
    assert isinstance(space.model, CpuLatency)
    space.model.measure(space.works(site.name, candidate.name, candidate.rank), QuietEvents())
    space.reprice()
    after = space.scored[site.name]
    assert [(c.name, c.rank) for c in after.candidates][-1] == (candidate.name, candidate.rank)
    assert after.candidates[-1].cost.kind is Kind.MEASURED is not candidate.cost.kind
    same = ("params", "size", "macs")
    assert all(after.candidates[-1].cost.metric(m) == candidate.cost.metric(m) for m in same)
    dense = {m: sum(s.options[0].costs[m] for s in space.problem({}, {}).sites) for m in ("latency", "macs")}
    for metric, value in dense.items():  # the dense plan costs what the network does, before as after
        assert value + space.problem({}, {}).fixed[metric] == pytest.approx(space.baseline.metric(metric), rel=1e-12)
        assert space.baseline.metric(metric) == pytest.approx(
            before.fixed[metric] + sum(s.options[0].costs[metric] for s in before.sites), rel=1e-12
        )


def test_without_a_latency_budget_nothing_is_measured() -> None:
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    refinement, _ = refined(space, 0.5)
    assert not refinement.settle(space, MilpSolver(), {"macs": 0.5 * space.baseline.macs}, {}, 10)
    assert trials.rounds == []


def test_limits_end_it_with_measured_chains() -> None:
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    late = Refinement(replace(EFFORT, stages=10), lambda: False, QuietEvents())
    _, budgets = refined(space, 0.7)
    affordable(space, MilpSolver(), budgets, {}, EFFORTS["quick"], late)
    assert sum(len(each) for each in trials.rounds) == late.stages == 10
    out_of_time = Refinement(EFFORT, lambda: True, QuietEvents())
    affordable(space, MilpSolver(), budgets, {}, EFFORTS["quick"], out_of_time)
    assert out_of_time.stages == 0


def test_a_budget_that_no_plan_keeps_ends_too() -> None:
    trials = MadeUpTrials(truth_s)
    space = space_of(trials)
    refinement, budgets = refined(space, 0.01)
    attempt, trace = affordable(space, MilpSolver(), budgets, {}, EFFORTS["quick"], refinement)
    assert attempt.plan.status == "infeasible" and not trace[-1]["met"]
    assert refinement.rounds <= EFFORT.rounds


def test_the_worth_of_latency_is_the_slope_at_which_the_budget_is_just_kept() -> None:
    """Two sites on the lines 1 - t and 2 (1 - t), sampled: the second gives way last, the first at worth 1."""
    times = np.linspace(0, 1, 11)
    sites = tuple(
        SiteOptions(
            name,
            tuple(Option("svd", (i + 1,), {"latency": float(t)}, slope * float(1 - t)) for i, t in enumerate(times)),
        )
        for name, slope in (("a", 1.0), ("b", 2.0))
    )
    problem = RankProblem(sites, {"latency": 0.25}, {"latency": 0.25 + 1.05})
    assert worth_of_latency(problem, "latency") == pytest.approx(1.0, rel=1e-6)
    assert worth_of_latency(replace(problem, budgets={"latency": 5.0}), "latency") == 0.0
