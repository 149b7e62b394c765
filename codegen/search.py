"""The loop: a plan, its price as a whole network, its chains and its loss, until the budgets hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from codegen.events import Events
from codegen.memory import attempt_name, load_chains, save_chains
from codegen.mirrored import Mirrored
from codegen.refinement import Refinement
from codegen.space import Effort, Space, cores
from codegen.walks import outputs_under, plain_chain, relative_error
from codegen.weighting import Posterior, guess
from passes.core.cost import Cost
from passes.core.site import Array, Chain
from passes.correct import Choice, Corrected, Correction, correct_each
from passes.onnx_stepper import Feeds, Stepper
from passes.ranks.milp import least
from passes.ranks.problem import RankPlan, RankProblem, RankSolver
from passes.sensitivity import divergence

PLANS_A_TURN = 2
"""A fixed number, not that of the cores: what comes out must not depend on the machine."""


@dataclass(eq=False)
class Attempt:
    """One plan carried out: its chains, its price as a whole, and what it does to the outputs.

    ``loss`` is that on the calibration samples, or on their mirror images where those judge; ``relative_l2`` is the
    outputs' relative error on the calibration samples.
    """

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
    judge: Mirrored | None = None,
) -> Attempt:
    """:func:`carry_out_each` for one attempt."""
    return carry_out_each([attempt], space, stepper, feeds, correction, events, judge)[0]


def carry_out_each(
    attempts: Sequence[Attempt],
    space: Space,
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    events: Events,
    judge: Mirrored | None = None,
) -> list[Attempt]:
    """Makes the attempts' chains: corrected in sequence on ``feeds``, or by the weights alone without a correction.

    Sites that cannot be walked to (inside bodies) go by their weights in either case. The relative error is that of
    the network's outputs on ``feeds``, and so is the loss where no ``judge`` tells it; NaN where it cannot be walked.
    An attempt gets what it would get alone, on any number of cores.
    """
    names = [attempt_name(attempt.choices, correction is not None) for attempt in attempts]
    done = {
        name: known
        for name, attempt in zip(names, attempts, strict=True)
        if (known := _known(attempt, name, space)) is not None
    }
    new = {name: a for name, a in zip(names, attempts, strict=True) if name not in done}
    made = _carry_out(list(new.values()), space, stepper, feeds, correction, events)
    if judge is not None and made:
        with events.stage("judge the plans"):
            made = [replace(attempt, loss=judge.loss(attempt.chains)) for attempt in made]
    done |= {name: _kept(attempt, name, space) for name, attempt in zip(new, made, strict=True)}
    return [done[name] for name in names]


def _known(attempt: Attempt, name: str, space: Space) -> Attempt | None:
    """The attempt as an interrupted run, or an earlier turn, carried it out under ``name``."""
    stored = load_chains(space.memory, name, space.sites, attempt.choices)
    if stored is None:
        return None
    chains, numbers = stored
    return replace(attempt, chains=chains, loss=numbers["loss"], relative_l2=numbers["relative_l2"])


def _kept(attempt: Attempt, name: str, space: Space) -> Attempt:
    save_chains(space.memory, name, attempt.chains, {"loss": attempt.loss, "relative_l2": attempt.relative_l2})
    return attempt


def _by_weights(attempt: Attempt, space: Space, but: Collection[str]) -> dict[str, Chain]:
    """Chains by the weights alone, for all sites of the attempt ``but`` some."""
    return {
        site.name: plain_chain(site, attempt.choices[site.name])
        for site in space.sites
        if attempt.choices[site.name].format is not None and site.name not in but
    }


def _carry_out(
    attempts: list[Attempt],
    space: Space,
    stepper: Stepper | None,
    feeds: Feeds | None,
    correction: Correction | None,
    events: Events,
) -> list[Attempt]:
    walked = set() if stepper is None else {s.name for s in stepper.sites.values()}
    plain = [_by_weights(attempt, space, () if correction is None else walked) for attempt in attempts]
    if stepper is None or feeds is None or not attempts:
        return [replace(attempt, chains=chains) for attempt, chains in zip(attempts, plain, strict=True)]
    if correction is None:
        before = outputs_under(stepper, feeds, {})
        found = [Corrected(chains, outputs_under(stepper, feeds, chains)) for chains in plain]
    else:
        plans = [{name: c for name, c in attempt.choices.items() if name in walked} for attempt in attempts]
        with events.stage("correct in sequence", len(stepper.sites)) as progress:
            found, before = correct_each(
                stepper,
                feeds,
                plans,
                correction,
                space.metrics,
                lambda site: progress.advance(1, site.name),
                cores(),
                space.original,
            )
    return [
        replace(
            attempt,
            chains=chains | corrected.chains,
            loss=divergence(corrected.outputs, before),
            relative_l2=relative_error(corrected.outputs, before),
        )
        for attempt, chains, corrected in zip(attempts, plain, found, strict=True)
    ]


def fit_finally(attempt: Attempt, space: Space, mirrored: Mirrored, correction: Correction, events: Events) -> Attempt:
    """The plan's chains fitted on the samples and their mirror images, at twice the positions of a search.

    Every third of these is seen as the original network has it, too. The loss stays that by which it was chosen, if so.
    """
    space.original.forget()
    name = attempt_name(attempt.choices, True) + "-fitted"
    known = _known(attempt, name, space)
    if known is not None:
        return known
    stepper = mirrored.stepper
    walked = {site.name for site in stepper.sites.values()}
    choices = {name: choice for name, choice in attempt.choices.items() if name in walked}
    options = replace(correction, samples=2 * correction.samples, clean=3)
    with events.stage("fit the chosen plan", len(stepper.sites)) as progress:
        (found,), before = correct_each(
            stepper, mirrored.both, [choices], options, space.metrics,
            lambda site: progress.advance(1, site.name), cores(),
        )  # fmt: skip
    after, reference = ({k: v[: mirrored.count] for k, v in o.items()} for o in (found.outputs, before))
    chains = _by_weights(attempt, space, walked) | found.chains
    return _kept(replace(attempt, chains=chains, relative_l2=relative_error(after, reference)), name, space)


def affordable(
    space: Space,
    solver: RankSolver,
    budgets: Mapping[str, float],
    errors: Mapping[str, float],
    effort: Effort,
    refinement: Refinement | None = None,
) -> tuple[Attempt, list[dict[str, Any]]]:
    """Solves, prices the whole network, tightens the additive limits by what it missed, and solves again.

    The sum over layers and the price of the network differ where a target treats neighbours together. Ends when every
    budget holds on the network, or is proven out of reach, or no further plan comes. With a ``refinement``, prices are
    measured first where the plan depends on them.
    """
    measured = refinement is not None and refinement.settle(space, solver, budgets, errors, effort.solver_s)
    limits = dict(budgets)
    trace: list[dict[str, Any]] = []
    best: Attempt | None = None
    for _ in range(8):
        problem = space.problem(limits, errors, measured)
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


_ENDED_EARLY = "the time budget ended the search early: the best plan so far is used"


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
    refinement: Refinement | None = None,
    judge: Mirrored | None = None,
) -> tuple[Attempt, list[dict[str, Any]]]:
    """Plans under several weightings of the sites' errors, each carried out; the one that loses least stays.

    No sum over layers predicts the joint loss well enough to choose between plans that are close, so it is measured.
    The first weights are guessed from the measured sensitivities; each turn after them learns from all losses so far
    (:mod:`codegen.weighting`) and carries out ``PLANS_A_TURN`` more plans. With a ``judge``, who has the chosen plan
    fitted anew, losses are his, and plans are fitted to half as many positions.
    """
    trace: list[dict[str, Any]] = []
    tried: dict[str, Attempt] = {}
    searched = bool(space.weights) and correction is not None
    rng = np.random.default_rng(0 if correction is None else correction.seed)
    if correction is not None and judge is not None:
        correction = replace(correction, samples=correction.samples // 2)

    def proposals() -> Iterator[dict[str, dict[str, float]]]:
        """Weightings of a turn by the names that the trace gives to them; a later turn learns from those before."""
        if not searched:
            yield {"1": {}}
            return
        guesses = effort.weightings
        for start in range(0, len(guesses), PLANS_A_TURN):
            some = guesses[start : start + PLANS_A_TURN]
            yield {f"sensitivity^{p:g}, tilt {t:g}": guessed_weights(space, p, t) for p, t in some}
        for turn in range(effort.turns):
            learned = learned_weights(space, list(tried.values()), rng)
            yield {f"what turn {turn + 1} learned, {k}": weights for k, weights in enumerate(learned)}

    for weightings in proposals():
        if tried and out_of_time():
            events.note(_ENDED_EARLY)
            break
        new: dict[str, tuple[Attempt, dict[str, Any]]] = {}
        for note, weights in weightings.items():
            with events.stage("choose ranks"):
                attempt, turns = affordable(space, solver, budgets, weights, effort, refinement)
            trace.extend(turns)
            name = attempt_name(attempt.choices, correction is not None)
            if name not in tried and name not in new:
                new[name] = attempt, turns[-1]
                turns[-1]["note"] = f"errors weighted by {note}"
            if len(new) == PLANS_A_TURN:
                break
        attempts = [attempt for attempt, _ in new.values()]
        done = carry_out_each(attempts, space, stepper, feeds, correction, events, judge)
        for (name, (_, turn)), attempt in zip(new.items(), done, strict=True):
            turn["note"] += f": {loss_text(attempt, judge)}"
            tried[name] = attempt
    return min(tried.values(), key=lambda a: (_excess(a, budgets), a.loss)), trace


def loss_text(attempt: Attempt, judge: Mirrored | None) -> str:
    """The loss of an attempt, and on what."""
    return f"loss on the {'' if judge is None else 'mirrored '}calibration data {attempt.loss:.4g}"


def guessed_weights(space: Space, power: float, tilt: float) -> dict[str, float]:
    """Weights by site name, from the measured sensitivities alone."""
    return _by_site(space, guess(np.array(list(space.weights.values())), power, tilt))


def learned_weights(space: Space, tried: Sequence[Attempt], rng: np.random.Generator) -> list[dict[str, float]]:
    """Weightings for the next plans: the middle of what the plans so far say of the weights, then draws around it.

    More than one turn needs, since some lead to plans that were tried before.
    """
    posterior = Posterior(
        np.array(list(space.weights.values())),
        np.array([[space.error(name, attempt.choices[name]) for name in space.weights] for attempt in tried]),
        np.array([attempt.loss for attempt in tried]),
    )
    found = [posterior.mean(), *(posterior.draw(rng) for _ in range(3 * PLANS_A_TURN))]
    return [_by_site(space, weights) for weights in found]


def _by_site(space: Space, log_weights: Array) -> dict[str, float]:
    return dict(zip(space.weights, np.exp(log_weights).tolist(), strict=True))


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
    out_of_time: Callable[[], bool],
    events: Events,
    refinement: Refinement | None = None,
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
            if probe and out_of_time():
                events.note(_ENDED_EARLY)
                break
            middle = low + (high - low) / 2 if probe else low + (high - low) * 0.6
            attempt, _ = affordable(space, solver, {"latency": middle * full}, {}, effort, refinement)
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
