"""The solver: budgets, proof, repeatability, and what it finds that predicted errors do not tell."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.core.site import Geometry, Stage
from passes.errors import InputError, UsageError
from passes.ranks.context import SearchContext
from passes.ranks.milp import MilpSolver
from passes.ranks.problem import Option, RankPlan, RankProblem, SiteOptions
from passes.training.data import TrainingSet
from passes.training.haloc import HalocOptions, HalocSolver, _affordable_steps
from passes.training.network import TrainableNetwork
from tests.search_contexts import context_of, linear_context, sequential

SHORT = HalocSolver(options=HalocOptions(rounds=1, steps=3, batch=4))


@st.composite
def problems(draw: st.DrawFn) -> RankProblem:
    """Sites of up to 4 options; the budgets are between the least and the dense network's costs, or below."""
    number = st.floats(0.5, 9.5)
    sites = []
    for s in range(draw(st.integers(1, 4))):
        options = [Option("dense", (), {"latency": 10.0, "macs": draw(number) + 10.0}, 0.0)]
        for r in range(draw(st.integers(0, 3))):
            options.append(Option("svd", (r + 1,), {"latency": draw(number), "macs": draw(number)}, draw(number)))
        sites.append(SiteOptions(f"site{s}", tuple(options)))
    share = st.floats(0.2, 1.0)
    dense = {m: sum(s.options[0].costs[m] for s in sites) + 1.0 for m in ("latency", "macs")}
    budgets = {"latency": draw(share) * dense["latency"]}
    if draw(st.booleans()):
        budgets["macs"] = draw(share) * dense["macs"]
    return RankProblem(tuple(sites), {"latency": 1.0, "macs": 1.0}, budgets)


@settings(max_examples=12)
@given(problem=problems())
def test_a_trained_plan_keeps_every_budget_that_any_plan_keeps(problem: RankProblem) -> None:
    plan = SHORT.search(problem, linear_context(problem))
    exact = MilpSolver().solve(problem)
    assert plan.solver == "haloc" and (plan.status == "infeasible") == (exact.status == "infeasible")
    assert plan.out_of_reach == exact.out_of_reach
    if plan.status != "infeasible":
        assert all(problem.total(plan.picks, m) <= limit * (1 + 1e-9) for m, limit in problem.budgets.items())
        assert exact.bound <= plan.objective + 1e-12
        assert plan.bound == pytest.approx(min(exact.bound, plan.objective))
        assert plan.objective == problem.total(plan.picks, "error")


def misjudged() -> tuple[TrainableNetwork, RankProblem, TrainingSet]:
    """Two layers whose predicted errors say the opposite of the truth.

    The second layer reads one direction alone, which the first one passes on with its least singular value. Cut to
    rank 1, the first layer loses everything that counts, and is predicted to lose next to nothing; the second one
    loses nothing at all, and is predicted to lose almost all. The budget lets one of the two keep its rank.
    """
    first = np.diag([5.0, 4.0, 3.0, 2.0, 1.0]).astype(np.float32)
    second = np.zeros((3, 5), np.float32)
    second[:, 4] = [6.0, 0.0, -6.0]
    bias = np.array([-3.0, 0.0, 3.0], np.float32)
    network = sequential([Stage(first, np.zeros(5, np.float32)), Stage(second, bias)], ["first", "second"], (5,))

    def options(error: float) -> tuple[Option, ...]:
        return (Option("dense", (), {"latency": 10.0}, 0.0), Option("svd", (1,), {"latency": 2.0}, error))

    sites = (SiteOptions("first", options(0.01)), SiteOptions("second", options(0.5)))
    problem = RankProblem(sites, {"latency": 0.0}, {"latency": 12.0})
    inputs = np.random.default_rng(0).uniform(0, 1, (128, 5)).astype(np.float32)
    return network, problem, TrainingSet.of({"x": inputs})


def test_a_rank_that_the_prediction_gave_away_grows_back() -> None:
    """No labels: the dense network is all there is to learn from."""
    network, problem, data = misjudged()
    assert MilpSolver().solve(problem).picks == (1, 0)
    context = context_of(network, problem, data)
    at_once = HalocSolver().search(problem, context, time_limit_s=0.0)
    assert at_once.picks == (1, 0), "the search starts where the prediction is"
    options = HalocOptions(rounds=8, steps=12, batch=16)
    plan = HalocSolver(options=options).search(problem, context)
    assert plan.picks == (0, 1)
    assert plan.status == "feasible" and plan.objective == 0.5 and plan.bound == pytest.approx(0.01)


def test_the_same_seed_gives_the_same_plan_and_another_one_other_preferences() -> None:
    network, problem, data = misjudged()
    plans = [SHORT.search(problem, context_of(network, problem, data, seed)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].preferences != plans[2].preferences


def test_the_dense_network_and_its_data_stay_as_they_were() -> None:
    network, problem, data = misjudged()
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    inputs = data.inputs["x"].clone()
    SHORT.search(problem, context_of(network, problem, data))
    assert all(torch.equal(value, before[name]) for name, value in network.module.state_dict().items())
    assert torch.equal(data.inputs["x"], inputs)


def test_labels_count_where_there_are_any() -> None:
    network, problem, data = misjudged()
    labelled = TrainingSet(data.inputs, torch.zeros(len(data), dtype=torch.int64))
    with_labels, without = (SHORT.search(problem, context_of(network, problem, d)) for d in (labelled, data))
    assert with_labels.preferences != without.preferences
    wrong = TrainingSet(data.inputs, torch.full((len(data),), 3))
    with pytest.raises(InputError, match="3 classes"):
        SHORT.search(problem, context_of(network, problem, wrong))


def never() -> TrainableNetwork:
    raise AssertionError("nothing should be trained")


def untrained(problem: RankProblem) -> RankPlan:
    context = linear_context(problem)
    return SHORT.search(problem, replace(context, network=never))


def test_nothing_is_trained_where_there_is_nothing_to_choose() -> None:
    _, problem, _ = misjudged()
    loose = untrained(replace(problem, budgets={"latency": 20.0}))
    assert (loose.picks, loose.status, loose.objective) == ((0, 0), "optimal", 0.0)
    tight = untrained(replace(problem, budgets={"latency": 3.0}))
    assert (tight.status, tight.out_of_reach) == ("infeasible", {"latency": 4.0})
    with pytest.raises(UsageError, match="--solver haloc needs a budget"):
        untrained(replace(problem, budgets={}))


def test_a_time_limit_ends_the_search_with_a_plan() -> None:
    _, problem, _ = misjudged()
    steps: list[int] = []

    def progress(done: int, of: int, note: str) -> None:
        steps.append(done)
        time.sleep(0.05)

    context = replace(linear_context(problem), progress=progress)
    plan = HalocSolver(options=HalocOptions(steps=100, batch=4)).search(problem, context, time_limit_s=0.3)
    assert plan.status == "feasible" and problem.total(plan.picks, "latency") <= 12.0
    assert 1 <= len(steps) <= 6, "of 2400"


def test_progress_tells_all_steps() -> None:
    network, problem, data = misjudged()
    told: list[tuple[int, int]] = []
    context = replace(context_of(network, problem, data), progress=lambda done, of, note: told.append((done, of)))
    SHORT.search(problem, context)
    assert told == [(k, 6) for k in range(1, 7)]


def test_sites_that_gradients_do_not_reach_are_chosen_by_their_prediction() -> None:
    network, problem, data = misjudged()
    hidden = TrainableNetwork(
        network.module, network.inputs, network.outputs, {"first": network.sites["first"]}, {"first": "0"}
    )
    plan = SHORT.search(problem, context_of(hidden, problem, data))
    assert problem.total(plan.picks, "latency") <= 12.0 and len(plan.preferences[1]) == 2
    nothing = TrainableNetwork(network.module, network.inputs, network.outputs)
    assert SHORT.search(problem, context_of(nothing, problem, data)).picks == (1, 0)


def convolutions() -> tuple[TrainableNetwork, RankProblem, SearchContext]:
    rng = np.random.default_rng(0)
    geometry = Geometry((3, 3), pads=(1, 1, 1, 1))
    shapes = [(6, 3), (6, 6), (4, 6)]
    stages = [Stage(rng.standard_normal((o, i, 3, 3)).astype(np.float32) / 5, None, geometry) for o, i in shapes]
    network = sequential(stages, ["a", "b", "c"], (3, 6, 6))
    sites = []
    for name in "abc":
        costs = [{"latency": latency, "macs": macs} for latency, macs in ((10.0, 9.0), (6.0, 4.0), (4.0, 6.0))]
        options = (("dense", (), 0.0), ("tucker2", (2, 3), 0.2), ("spatial_svd_vh", (2,), 0.3))
        sites.append(SiteOptions(name, tuple(Option(f, r, c, e) for (f, r, e), c in zip(options, costs, strict=True))))
    problem = RankProblem(tuple(sites), {"latency": 1.0, "macs": 1.0}, {"latency": 22.0, "macs": 20.0})
    data = TrainingSet.of({"x": rng.standard_normal((12, 3, 6, 6)).astype(np.float32)})
    return network, problem, context_of(network, problem, data)


def test_two_budgets_on_a_network_whose_output_is_an_image() -> None:
    """Nothing to classify: outputs are compared by their relative square."""
    _, problem, context = convolutions()
    plan = SHORT.search(problem, context)
    assert plan.status == "feasible"
    assert problem.total(plan.picks, "latency") <= 22.0 and problem.total(plan.picks, "macs") <= 20.0


def test_a_large_network_gets_smaller_batches_and_then_fewer_steps() -> None:
    """MACs of the three layers: 36 positions x 9 x (18 + 36 + 24) = 25,272, four times that a sample and step."""
    network, _, _ = convolutions()
    each = 4 * 36 * 9 * (18 + 36 + 24)
    options = HalocOptions(rounds=2, steps=10, batch=64)
    assert _affordable_steps(network, replace(options, macs=each * 1e9)) == (10, 64)
    assert _affordable_steps(network, replace(options, macs=each * 4 * 10 * 20.0)) == (10, 20)
    assert _affordable_steps(network, replace(options, macs=each * 4 * 3 * 8.0)) == (3, 8)
    assert _affordable_steps(network, replace(options, macs=1.0)) == (1, 8)


def test_data_that_are_no_numbers_are_refused() -> None:
    network, problem, data = misjudged()
    inputs = data.inputs["x"].clone()
    inputs[::2] = float("nan")
    with pytest.raises(InputError, match="no number"):
        SHORT.search(problem, context_of(network, problem, TrainingSet({"x": inputs})))
