"""The loop: a plan, its price as a whole network, its chains and its loss, until the budgets hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from codegen.events import Events
from codegen.memory import (
    attempt_name,
    load_chains,
    save_chains,
)
from codegen.space import Effort, Space
from codegen.walks import outputs_under, plain_chain, relative_error
from passes.core.cost import Cost
from passes.core.site import Chain
from passes.correct import Choice, Correction, correct
from passes.onnx_stepper import Feeds, Stepper
from passes.ranks.milp import least
from passes.ranks.problem import RankPlan, RankProblem, RankSolver
from passes.sensitivity import divergence


@dataclass(eq=False)
class Attempt:
    """One plan carried out: its chains, its price as a whole, and what it does to the calibration outputs."""

    plan: RankPlan
    problem: RankProblem
    choices: dict[str, Choice]
    cost: Cost
    chains: dict[str, Chain] = field(default_factory=dict)
    loss: float = float("nan")
    relative_l2: float = float("nan")


def carry_out(
    attempt: Attempt,
    space: Space,
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    events: Events,
) -> Attempt:
    """Makes the attempt's chains: corrected in sequence on ``feeds``, or by the weights alone without a correction.

    Sites that cannot be walked to (inside bodies) go by their weights in either case. The loss and the relative error
    are those of the network's outputs on ``feeds``; NaN where it cannot be walked.
    """
    name = attempt_name(attempt.choices, correction is not None)
    known = load_chains(space.memory, name, space.sites, attempt.choices)
    if known is not None:
        chains, numbers = known
        return replace(attempt, chains=chains, loss=numbers["loss"], relative_l2=numbers["relative_l2"])
    done = _carry_out(attempt, space, stepper, feeds, correction, events)
    save_chains(space.memory, name, done.chains, {"loss": done.loss, "relative_l2": done.relative_l2})
    return done


def _carry_out(
    attempt: Attempt,
    space: Space,
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    events: Events,
) -> Attempt:
    walked = set() if stepper is None else {s.name for s in stepper.sites.values()}
    chains: dict[str, Chain] = {}
    for site in space.sites:
        choice = attempt.choices[site.name]
        if choice.format is not None and (correction is None or site.name not in walked):
            chains[site.name] = plain_chain(site, choice)
    if stepper is None or feeds is None:
        return replace(attempt, chains=chains)
    if correction is None:
        before, after = outputs_under(stepper, feeds, {}), outputs_under(stepper, feeds, chains)
    else:
        choices = {name: c for name, c in attempt.choices.items() if name in walked}
        with events.stage("correct in sequence", len(choices)) as progress:
            corrected, before, after = correct(
                stepper, feeds, choices, correction, space.roots, lambda site: progress.advance(1, site.name)
            )
        chains |= corrected
    return replace(attempt, chains=chains, loss=divergence(after, before), relative_l2=relative_error(after, before))


def affordable(
    space: Space, solver: RankSolver, budgets: Mapping[str, float], errors: Mapping[str, float], effort: Effort
) -> tuple[Attempt, list[dict[str, Any]]]:
    """Solves, prices the whole network, tightens the additive limits by what it missed, and solves again.

    The sum over layers and the price of the network differ where a target treats neighbours together. Ends when every
    budget holds on the network, or is proven out of reach, or no further plan comes.
    """
    limits = dict(budgets)
    trace: list[dict[str, Any]] = []
    best: Attempt | None = None
    for _ in range(8):
        problem = space.problem(limits, errors)
        plan = solver.solve(problem, effort.solver_s)
        choices = space.choices(problem, plan.picks)
        cost = space.price(choices)
        attempt = Attempt(plan, problem, choices, cost)
        over = {m: cost.metric(m) - budgets[m] for m in budgets if cost.metric(m) > budgets[m]}
        trace.append(
            {
                "predicted": {m: problem.total(plan.picks, m) for m in budgets},
                "network": {m: cost.metric(m) for m in budgets},
                "met": not over,
                "objective": plan.objective,
                "bound": plan.bound,
                "gap": plan.gap,
            }
        )
        if best is None or _excess(attempt, budgets) < _excess(best, budgets) or not over:
            best = attempt
        if not over or plan.status == "infeasible":
            break
        tightened = {}
        for metric in over:
            miss = cost.metric(metric) - budgets[metric]
            tightened[metric] = min(limits[metric], problem.total(plan.picks, metric)) - max(
                miss, 1e-9 * budgets[metric]
            )
        limits = {**limits, **tightened}
    assert best is not None
    return best, trace


def best_within_budgets(
    space: Space,
    solver: RankSolver,
    budgets: Mapping[str, float],
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    effort: Effort,
    out_of_time: Callable[[], bool],
    events: Events,
) -> tuple[Attempt, list[dict[str, Any]]]:
    """Plans under several weightings of the sites' errors, each carried out; the one that loses least stays.

    No sum over layers predicts the joint loss well enough to choose between plans that are close, so it is measured.
    """
    trace: list[dict[str, Any]] = []
    best: Attempt | None = None
    seen: set[tuple[Any, ...]] = set()
    powers = effort.weightings if space.weights and correction is not None else (0.0,)
    for power in powers:
        if best is not None and out_of_time():
            events.note("the time budget ended the search early: the best plan so far is used")
            break
        weights = {name: value**power for name, value in space.weights.items()}
        with events.stage("choose ranks"):
            attempt, turns = affordable(space, solver, budgets, weights, effort)
        trace.extend(turns)
        key = tuple((n, c.format.name if c.format else "", c.rank) for n, c in sorted(attempt.choices.items()))
        if key in seen:
            continue
        seen.add(key)
        attempt = carry_out(attempt, space, stepper, feeds, correction, events)
        trace[-1]["note"] = f"errors weighted by sensitivity^{power:g}: loss on the calibration data {attempt.loss:.4g}"
        if best is None or (_excess(attempt, budgets), attempt.loss) < (_excess(best, budgets), best.loss):
            best = attempt
    assert best is not None
    return best, trace


def _excess(attempt: Attempt, budgets: Mapping[str, float]) -> float:
    return sum(max(0.0, attempt.cost.metric(m) / max(b, 1e-30) - 1) for m, b in budgets.items())


def fastest_within(
    space: Space,
    solver: RankSolver,
    max_error: float,
    stepper: Stepper,
    feeds: Feeds,
    correction: Correction | None,
    effort: Effort,
    events: Events,
) -> tuple[Attempt, list[dict[str, Any]]]:
    """The fastest plan whose outputs stay within ``max_error`` (relative L2) of the original's on ``feeds``.

    Bisects the latency: the error is that of the network with corrected factors, not a sum over layers. Falls back to
    the network as it is when no plan stays within the error.
    """
    dense = {s.name: Choice() for s in space.sites}
    trace: list[dict[str, Any]] = []
    full = space.baseline.latency
    problem = space.problem({"latency": full}, {})
    low, high = least(problem, "latency") / full, 1.0
    best: Attempt | None = None
    with events.stage("search within the error", 7):
        for probe in range(7):
            middle = low + (high - low) / 2 if probe else low + (high - low) * 0.6
            attempt, _ = affordable(space, solver, {"latency": middle * full}, {}, effort)
            attempt = carry_out(attempt, space, stepper, feeds, correction, events)
            within = attempt.relative_l2 <= max_error
            trace.append(
                {"predicted": {"latency": middle * full}, "network": {"latency": attempt.cost.latency},
                 "relative_l2": attempt.relative_l2, "met": within}
            )  # fmt: skip
            if within:
                best, high = attempt, min(middle, attempt.cost.latency / full)
            else:
                low = middle
            if high - low < 0.01:
                break
    if best is None:
        plan = solver.solve(problem, effort.solver_s)
        picks = tuple(0 for _ in space.sites)
        plan = replace(plan, picks=picks, status="feasible", objective=0.0, bound=0.0)
        best = Attempt(plan, problem, dense, space.baseline, loss=0.0, relative_l2=0.0)
    return best, trace
