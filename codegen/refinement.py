"""Prices where the decision falls: trials of the layers that a plan would choose, until no better plan is in sight.

A target that is tuned has times of some chains and predictions of the others. Two plans are compared: the best one of
chains that were all measured, and the best one at the prices of the day. While the second promises to lose less, its
chains are measured, and those that nearly got into it. So trials go where they can change the choice, and a search that
starts from the trials of another one makes hardly any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from codegen.events import Events
from codegen.measurable import MeasurablePrices
from codegen.space import Space
from passes.core.cost import StageWork
from passes.ranks.problem import RankPlan, RankProblem, RankSolver


@dataclass(frozen=True)
class TuningEffort:
    """How far prices are refined.

    ``trials`` of a stage; ``rounds`` of trials for one plan; ``stages`` tried and ``seconds`` spent on it in the whole
    search, beyond which plans keep to what was measured. ``gap``: what a plan of measured chains may lose beyond what
    unmeasured ones promise, relative: above it measuring starts, below half of it it ends. ``near``: other chains of a
    site that are measured together with the chosen one.
    """

    trials: int
    rounds: int
    stages: int
    seconds: float
    gap: float
    near: int


TUNING_EFFORTS = {
    "quick": TuningEffort(4, 3, 120, 90.0, 0.1, 1),
    "default": TuningEffort(8, 8, 500, 420.0, 0.04, 2),
    "extensive": TuningEffort(32, 24, 4000, 7200.0, 0.01, 4),
}


class Refinement:
    """Refines the prices of one search; ``out_of_time`` ends it.

    ``stages``, ``rounds`` and ``seconds`` count what was tried so far.
    """

    def __init__(self, effort: TuningEffort, out_of_time: Callable[[], bool], events: Events) -> None:
        self.effort, self.out_of_time, self.events = effort, out_of_time, events
        self.stages, self.rounds, self.seconds = 0, 0, 0.0
        self._started: float | None = None

    def settle(
        self,
        space: Space,
        solver: RankSolver,
        budgets: Mapping[str, float],
        errors: Mapping[str, float],
        solver_s: float,
    ) -> bool:
        """Measures what the plan under these budgets depends on; True where it may keep to measured chains.

        Prices in ``space`` are those of the list when it returns. False where latency is not limited, where the list
        cannot be measured, and where no plan of measured chains keeps the budgets, but one of predicted prices does.
        """
        model = space.model
        if "latency" not in budgets or not isinstance(model, MeasurablePrices):
            return False
        gap = self.effort.gap
        for turn in range(self.effort.rounds + 1):
            sure_problem = space.problem(budgets, errors, measured=True)
            hoped_problem = space.problem(budgets, errors)
            sure, hoped = (solver.solve(problem, solver_s) for problem in (sure_problem, hoped_problem))
            if _good_enough(sure, hoped, gap):
                return True
            wanted = model.wanting(self._worth_measuring(space, hoped_problem, hoped))
            room = self.effort.stages - self.stages
            if not wanted or room <= 0 or turn == self.effort.rounds or self._late():
                return sure.status != "infeasible" or hoped.status == "infeasible"
            self.stages += len(wanted[:room])
            self.rounds += 1
            self._started = time.perf_counter()
            model.measure(wanted[:room], self.events, self._late)
            self.seconds += time.perf_counter() - self._started
            self._started = None
            space.reprice()
            gap = self.effort.gap / 2
        raise AssertionError("the last turn returns")

    def _late(self) -> bool:
        now = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.seconds + now > self.effort.seconds or self.out_of_time()

    def _worth_measuring(self, space: Space, problem: RankProblem, plan: RankPlan) -> list[StageWork]:
        """Stages of the plan's chains, then of those that might replace them were they a little cheaper."""
        chosen = list(plan.picks)
        works = [
            stage
            for site, pick in zip(problem.sites, chosen, strict=True)
            for stage in space.works(site.site, site.options[pick].format, site.options[pick].rank)
        ]
        value = worth_of_latency(problem, "latency")
        for site, pick in zip(problem.sites, chosen, strict=True):
            candidates = [space.works(site.site, o.format, o.rank) for o in site.options]
            assert isinstance(space.model, MeasurablePrices)
            spread = np.array(space.model.spread(candidates))
            score = np.array([o.error + value * (o.costs["latency"] - spread[i]) for i, o in enumerate(site.options)])
            own = site.options[pick].error + value * site.options[pick].costs["latency"]
            near = [i for i in np.argsort(score, kind="stable") if i != pick and spread[i] > 0 and score[i] < own]
            works += [stage for i in near[: self.effort.near] for stage in candidates[i]]
        return list(dict.fromkeys(works))


def _good_enough(sure: RankPlan, hoped: RankPlan, gap: float) -> bool:
    if sure.status == "infeasible" or hoped.status == "infeasible":
        return False
    return sure.objective <= hoped.objective * (1 + gap) + 1e-12


def worth_of_latency(problem: RankProblem, metric: str) -> float:
    """What a unit of the metric is worth in error at its budget: the multiplier of the relaxed problem.

    With it, each site for itself takes the option of the least error + worth * cost, and the budget is just kept. The
    problem's budget holds for the sum; found by bisection. 0 where every site can have its best option.
    """
    tables = [
        (np.array([o.error for o in s.options]), c) for s, c in zip(problem.sites, problem.costs(metric), strict=True)
    ]
    limit = problem.budgets[metric] - problem.fixed.get(metric, 0.0)

    def total(worth: float) -> float:
        return float(sum(costs[np.argmin(errors + worth * costs)] for errors, costs in tables))

    if not tables or total(0.0) <= limit:
        return 0.0
    unit = float(max(errors.max() for errors, _ in tables) / max(costs.max() for _, costs in tables))
    low, high = 1e-9 * unit, 1e9 * unit
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if total(middle) <= limit else (middle, high)
    return high
