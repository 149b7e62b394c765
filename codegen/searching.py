"""Solvers that look at the network: what they are given, and how their plan is held to the price of the network.

Such a solver searches once. Where the network as a whole costs more than its layers' sum, or the emitted files more
than their price, its plan is chosen anew by what it has learned, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from codegen.events import Events, Progress
from codegen.measurable import MeasurablePrices
from codegen.memory import Memory
from codegen.mirrored import Mirrored
from codegen.refinement import Refinement
from codegen.search import Attempt, affordable, carry_out, guessed_weights, loss_text
from codegen.space import Effort, Space, cores
from codegen.weighting import POWER, TILT
from passes import registry
from passes.core.cost import METRICS
from passes.core.fit import FitProblem
from passes.core.moments import Moments
from passes.correct import Correction
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Feeds, Stepper
from passes.ranks.context import SearchContext, SearchingSolver, SiteFactors
from passes.ranks.milp import MilpSolver
from passes.ranks.problem import RankPlan, RankProblem
from passes.sensitivity import moments_by_site

if TYPE_CHECKING:
    from passes.training.data import TrainingSet

Learned = dict[str, dict[tuple[str, tuple[int, ...]], float]]
"""A loss by site, format and rank: what a search has found out."""


@dataclass(eq=False)
class Search:
    """The search of one run by a solver that looks at the network; :meth:`run` may be called again, with other budgets.

    ``data`` is what it may train on. ``feeds`` and ``correction`` are the calibration's; None where there is none.
    ``judge`` tells the losses of plans where there is one.
    """

    solver: SearchingSolver
    space: Space
    network: OnnxGraph
    data: TrainingSet
    stepper: Stepper | None
    feeds: Feeds | None
    correction: Correction | None
    effort: Effort
    effort_name: Literal["quick", "default", "extensive"]
    seed: int
    events: Events
    device: str = "cpu"
    learned: Learned | None = None
    bound: float = 0.0
    judge: Mirrored | None = None
    _moments: dict[str, Moments] | None = field(default=None, init=False)

    def run(
        self, budgets: Mapping[str, float], limit_s: float | None, refinement: Refinement | None = None
    ) -> tuple[Attempt, list[dict[str, Any]]]:
        """A plan that keeps the budgets as a network, carried out; and the trace of the plans before it."""
        weights = guessed_weights(self.space, POWER, TILT) if self.space.weights else {}
        trace: list[dict[str, Any]] = []
        attempt = None
        if self.learned is None:
            problem = self.space.problem(budgets, weights)
            plan = self._searched(problem, limit_s)
            self.bound = plan.bound
            self.learned = learned_of(problem, plan)
            attempt, turn = self._priced(plan, problem, budgets)
            trace.append(turn)
        sure = isinstance(self.space.model, MeasurablePrices)  # then the first plan rests on what was not measured
        if attempt is None or (attempt.plan.status != "infeasible" and (sure or not trace[-1]["met"])):
            attempt, turns = self._again(budgets, weights, refinement)
            trace.extend(turns)
        attempt = self._carried_out(attempt)
        trace[-1]["note"] = f"chosen by {self.solver.name}: {loss_text(attempt, self.judge)}"
        return attempt, trace

    def _carried_out(self, attempt: Attempt) -> Attempt:
        return carry_out(attempt, self.space, self.stepper, self.feeds, self.correction, self.events, self.judge)

    def _searched(self, problem: RankProblem, limit_s: float | None) -> RankPlan:
        """The solver's plan; the one that an interrupted run kept where there is one."""
        name = f"search-{problem.digest()[:16]}"
        known = load_plan(self.space.memory, name, self.solver.name, problem)
        if known is not None:
            self.events.note("the rank search is that of the interrupted run")
            return known
        with ExitStack() as stack:
            progress = _Lazy(stack, self.events, f"search with {self.solver.name}")
            plan = self.solver.search(problem, self._context(problem, progress), limit_s)
        save_plan(self.space.memory, name, plan)
        return plan

    def _priced(
        self, plan: RankPlan, problem: RankProblem, budgets: Mapping[str, float]
    ) -> tuple[Attempt, dict[str, Any]]:
        choices = self.space.choices(problem, plan.picks)
        cost = self.space.price(choices)
        turn = {
            "predicted": {m: problem.total(plan.picks, m) for m in budgets},
            "network": {m: cost.metric(m) for m in budgets},
            "met": all(cost.metric(m) <= limit for m, limit in budgets.items()),
            "objective": plan.objective,
            "bound": plan.bound,
            "gap": plan.gap,
        }
        return Attempt(plan, problem, choices, cost), turn

    def _again(
        self, budgets: Mapping[str, float], weights: Mapping[str, float], refinement: Refinement | None
    ) -> tuple[Attempt, list[dict[str, Any]]]:
        """The plan of least learned loss; told in predicted errors, as that of the search was."""
        assert self.learned is not None
        space = preferring(self.space, self.learned)
        attempt, turns = affordable(space, MilpSolver(), budgets, {}, self.effort, refinement)
        if isinstance(self.space.model, MeasurablePrices):
            self.space.reprice()  # by what was measured for the plan
        value = sum(weights.get(n, 1.0) * self.space.error(n, c) for n, c in attempt.choices.items())
        status = "feasible" if attempt.plan.status == "optimal" else attempt.plan.status
        bound = min(self.bound, value)
        plan = replace(attempt.plan, solver=self.solver.name, status=status, objective=value, bound=bound)
        for turn in turns:
            turn.update(objective=plan.objective, bound=plan.bound, gap=plan.gap)
        return replace(attempt, plan=plan), turns

    def _context(self, problem: RankProblem, progress: Callable[[int, int, str], None]) -> SearchContext:
        def evaluate(picks: Sequence[int]) -> float:
            plan = RankPlan(self.solver.name, "feasible", tuple(picks), 0.0, 0.0, "")
            attempt, _ = self._priced(plan, problem, problem.budgets)
            return self._carried_out(attempt).loss

        def cost(picks: Sequence[int]) -> dict[str, float]:
            found = self.space.price(self.space.choices(problem, picks))
            return {m: found.metric(m) for m in METRICS}

        def trainable() -> Any:
            from passes.onnx_module import to_trainable

            return to_trainable(self.network)

        return SearchContext(
            trainable, self._factors, self.data, evaluate, cost, progress, self.seed, self.effort_name, self.device
        )

    def _factors(self, site: str, format: str) -> SiteFactors:
        place = next(s for s in self.space.sites if s.name == site)
        weight = place.stage.grouped_weight().astype(np.float64)
        moments = self._statistics().get(site)
        metric = self.space.metrics.get(site)
        decompose = registry.FORMATS.load(format).decompose
        if moments is None or self.correction is None:
            return SiteFactors(decompose(place.stage.geometry, FitProblem(weight)), place.stage.bias)
        root = None if metric is None else metric.root
        problem = FitProblem(weight, moments.ridge(self.correction.ridge), root)
        return SiteFactors(decompose(place.stage.geometry, problem), place.stage.bias, moments.mean_x, moments.mean_t)

    def _statistics(self) -> dict[str, Moments]:
        if self._moments is None:
            self._moments = {}
            if self.stepper is not None and self.feeds is not None and self.correction is not None:
                with self.events.stage("collect statistics", len(self.stepper.sites)) as progress:
                    self._moments, _ = moments_by_site(
                        self.stepper, self.feeds, self.effort.elements, self.seed,
                        lambda s: progress.advance(1, s.name), cores(),
                    )  # fmt: skip
        return self._moments


class _Lazy:
    """A stage that opens with the first report, when its length is known."""

    def __init__(self, stack: ExitStack, events: Events, name: str) -> None:
        self._stack, self._events, self._name = stack, events, name
        self._stage: Progress | None = None
        self._done = 0

    def __call__(self, done: int, of: int, note: str) -> None:
        if self._stage is None:
            self._stage = self._stack.enter_context(self._events.stage(self._name, of))
        self._stage.advance(done - self._done, note)
        self._done = done


def learned_of(problem: RankProblem, plan: RankPlan) -> Learned:
    """What a plan tells of every option: its preferences, or else how far an option is from the one it chose.

    Distance is in predicted error, so that a plan which has to be changed is changed as little as possible.
    """
    rows: Sequence[Sequence[float]] = plan.preferences
    if not rows:
        errors = [np.array([o.error for o in site.options]) for site in problem.sites]
        unit = 1e-6 * max((float(e.max()) for e in errors), default=1.0)
        rows = [
            (np.abs(e - e[pick]) + unit * (np.arange(len(e)) != pick)).tolist()
            for e, pick in zip(errors, plan.picks, strict=True)
        ]
    return {
        site.site: {(o.format, o.rank): float(loss) for o, loss in zip(site.options, row, strict=True)}
        for site, row in zip(problem.sites, rows, strict=True)
    }


def preferring(space: Space, learned: Learned) -> Space:
    """The space with learned losses in the place of predicted errors; without candidates that nothing is known of."""
    scored = {}
    for name, site in space.scored.items():
        losses = learned[name]
        kept = tuple(c for c in site.candidates if (c.name, c.rank) in losses)
        relative = np.array([losses[c.name, c.rank] for c in kept])
        scored[name] = replace(site, candidates=kept, relative=relative, fisher=None)
    return replace(space, scored=scored)


def save_plan(memory: Memory, name: str, plan: RankPlan) -> None:
    """Keeps a search's plan for ``--resume``."""
    finite = np.isfinite(plan.bound)
    meta = {
        "solver": plan.solver,
        "status": plan.status,
        "picks": list(plan.picks),
        "objective": plan.objective,
        "bound": plan.bound if finite else None,
        "problem": plan.problem,
        "out_of_reach": plan.out_of_reach,
        "preferences": [list(row) for row in plan.preferences],
    }
    memory.checkpoint(name, {}, meta)


def load_plan(memory: Memory, name: str, solver: str, problem: RankProblem) -> RankPlan | None:
    """The plan that :func:`save_plan` kept of this problem, or None."""
    stored = memory.restore(name)
    if stored is None or stored[1]["solver"] != solver or stored[1]["problem"] != problem.digest():
        return None
    meta = stored[1]
    return RankPlan(
        solver, meta["status"], tuple(meta["picks"]), meta["objective"],
        float("-inf") if meta["bound"] is None else meta["bound"], meta["problem"], meta["out_of_reach"],
        tuple(tuple(row) for row in meta["preferences"]),
    )  # fmt: skip
