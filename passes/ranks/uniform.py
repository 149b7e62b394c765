"""Uniform ranks: every site gets the same fraction of its full cost. The baseline that others are compared with.

For a fraction f, each site takes the best option whose first budget's metric is at most f times its dense cost; f is
the largest one at which every budget holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.ranks.milp import least
from passes.ranks.problem import RankPlan, RankProblem


@dataclass(frozen=True)
class UniformSolver:
    name: str = "uniform"

    def solve(self, problem: RankProblem, time_limit_s: float | None = None) -> RankPlan:
        """Needs a budget; its bound is 0, since nothing is proven about the error."""
        if not problem.budgets:
            raise ValueError("uniform ranks need a budget")
        metric = next(iter(problem.budgets))
        table = problem.costs(metric)
        dense = [next(o.costs[metric] for o in s.options if o.format == "dense") for s in problem.sites]
        fractions = np.unique(np.concatenate([c / max(d, 1e-30) for c, d in zip(table, dense, strict=True)]))
        picks = self._at(problem, metric, dense, 0.0)
        met = False
        for fraction in fractions[::-1]:
            trial = self._at(problem, metric, dense, float(fraction))
            if all(problem.total(trial, m) <= limit for m, limit in problem.budgets.items()):
                picks, met = trial, True
                break
        reach = {m: least(problem, m) for m in problem.budgets}
        missed = {m: v for m, v in reach.items() if v > problem.budgets[m]}
        status = "feasible" if met else "infeasible"
        return RankPlan(self.name, status, picks, problem.total(picks, "error"), 0.0, problem.digest(), missed)

    def _at(self, problem: RankProblem, metric: str, dense: list[float], fraction: float) -> tuple[int, ...]:
        picks = []
        for site, full in zip(problem.sites, dense, strict=True):
            costs = np.array([o.costs[metric] for o in site.options])
            errors = np.array([o.error for o in site.options])
            allowed = np.flatnonzero(costs <= fraction * full * (1 + 1e-12))
            if len(allowed) == 0:
                picks.append(int(np.argmin(costs)))
            else:
                picks.append(int(allowed[np.argmin(errors[allowed])]))
        return tuple(picks)
