"""Exact rank choice: a multiple-choice knapsack with any number of budgets, by mixed-integer programming.

    min  sum e_ij z_ij      one z_ij = 1 per site i,   sum t_ij z_ij <= T  for every budget,   z binary

solved to proven optimality by HiGHS through scipy.optimize.milp. When no plan meets all budgets, the plan returned is
the one whose summed relative excess is least, and each budget that is out of reach by itself gets its proven bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from passes.core.site import Array
from passes.ranks.problem import RankPlan, RankProblem

_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2  # scipy's status codes
_RETRIES = 12
_ROUNDING = 1e-12  # of a sum of costs, relative


@dataclass(frozen=True)
class MilpSolver:
    """``gap``: relative optimality gap at which the search stops; 0 asks for the proof of optimality."""

    name: str = "milp"
    gap: float = 1e-5

    def solve(self, problem: RankProblem, time_limit_s: float | None = None) -> RankPlan:
        """The best plan, or the least bad one with status "infeasible"."""
        digest = problem.digest()
        model = _Model(problem)
        found = model.minimise(model.objective(), self._limits(problem), self.gap, time_limit_s)
        if found is not None:
            picks, bound, proven = found
            value = problem.total(picks, problem.objective)
            if problem.objective != "error":
                bound += problem.fixed.get(problem.objective, 0.0)
            status = "optimal" if proven else "feasible"
            return RankPlan(self.name, status, picks, value, min(bound, value), digest)
        return self._least_bad(problem, model, digest, time_limit_s)

    def _limits(self, problem: RankProblem) -> dict[str, float]:
        limits = {m: limit - problem.fixed.get(m, 0.0) for m, limit in problem.budgets.items()}
        if problem.error_limit is not None:
            limits["error"] = problem.error_limit
        return limits

    def _least_bad(self, problem: RankProblem, model: _Model, digest: str, time_limit_s: float | None) -> RankPlan:
        reach = {m: least(problem, m) for m in problem.budgets}
        out_of_reach = {m: value for m, value in reach.items() if value > problem.budgets[m]}
        # least summed relative excess first, then, at that excess, least error
        scale = {m: max(abs(limit), 1e-12) for m, limit in problem.budgets.items()}
        limits = {m: limit - problem.fixed.get(m, 0.0) for m, limit in problem.budgets.items()}
        slack = model.minimise_excess(limits, scale, self.gap, time_limit_s)
        relaxed = {m: limits[m] + slack[m] * (1 + 1e-9) + 1e-9 * scale[m] for m in limits}
        cheapest = model.minimise(model.errors, relaxed, self.gap, time_limit_s, exact=False)
        if cheapest is None:
            raise RuntimeError("the relaxed rank problem has no solution, although its excess was just computed")
        picks, bound, _ = cheapest
        value = problem.total(picks, "error")
        return RankPlan(self.name, "infeasible", picks, value, min(bound, value), digest, out_of_reach)


def least(problem: RankProblem, metric: str) -> float:
    """The least value of one metric over all plans: a proven bound, since the sites' choices are independent."""
    return float(sum(c.min() for c in problem.costs(metric)) + problem.fixed.get(metric, 0.0))


class _Model:
    """The problem as arrays: one binary variable per option."""

    def __init__(self, problem: RankProblem) -> None:
        self.problem = problem
        counts = [len(s.options) for s in problem.sites]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        self.size = int(self.starts[-1])
        rows = np.repeat(np.arange(len(counts)), counts)
        self.choose = coo_array((np.ones(self.size), (rows, np.arange(self.size))), shape=(len(counts), self.size))
        self.errors = np.array([o.error for s in problem.sites for o in s.options], dtype=float)
        self._costs = {m: np.concatenate([[], *problem.costs(m)]) for m in problem.budgets}

    def objective(self) -> Array:
        name = self.problem.objective
        return self.errors if name == "error" else np.concatenate(self.problem.costs(name))

    def _row(self, metric: str) -> Array:
        return self.errors if metric == "error" else self._costs[metric]

    def minimise(
        self, weights: Array, limits: dict[str, float], gap: float, time_limit_s: float | None, exact: bool = True
    ) -> tuple[tuple[int, ...], float, bool] | None:
        """Picks, proven bound of the weighted sum, and whether optimality was proven; None when infeasible.

        HiGHS lets a limit be exceeded by about a millionth. Where ``exact``, a plan that makes use of this is refused,
        and the search is repeated under a limit drawn in by the excess, then by more.
        """
        if not self.size:
            return ((), 0.0, True) if all(limit >= 0 for limit in limits.values()) else None
        drawn = dict(limits)
        bound = -np.inf
        for attempt in range(_RETRIES):
            found = self._minimise(weights, drawn, gap, time_limit_s)
            if found is None:
                return None
            picks, lower, proven = found
            if not attempt:
                bound = lower  # of the limits as they were given
            excess = {m: self._at(m, picks) - limit for m, limit in limits.items()}
            over = {m: e for m, e in excess.items() if e > _ROUNDING * max(abs(limits[m]), self._scale(m))}
            if not over or not exact:
                value = sum(float(weights[s + p]) for s, p in zip(self.starts, picks, strict=False))
                return picks, bound, proven and (not attempt or value - bound <= gap * abs(value))
            for metric, e in over.items():
                drawn[metric] = min(drawn[metric], limits[metric] - 4**attempt * e)
        return None

    def _scale(self, metric: str) -> float:
        return max(float(np.abs(self._row(metric)).max()), 1e-30)

    def _minimise(
        self, weights: Array, limits: dict[str, float], gap: float, time_limit_s: float | None
    ) -> tuple[tuple[int, ...], float, bool] | None:
        constraints: list[Any] = [LinearConstraint(csr_array(self.choose), 1, 1)]
        for metric, limit in limits.items():
            scale = self._scale(metric)
            constraints.append(LinearConstraint(self._row(metric)[None, :] / scale, -np.inf, limit / scale))
        scale = max(float(np.abs(weights).max()), 1e-30)
        result = self._run(weights / scale, constraints, np.ones(self.size), self.size, gap, time_limit_s)
        if result is None:
            return None
        picks = self._picks(result.x)
        bound = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
        return picks, float(bound) * scale, result.status == _OPTIMAL

    def minimise_excess(
        self, limits: dict[str, float], scale: dict[str, float], gap: float, time_limit_s: float | None
    ) -> dict[str, float]:
        """By how much each limit must be exceeded when the summed relative excess is least."""
        names = list(limits)
        total = self.size + len(names)
        choose = coo_array((self.choose.data, self.choose.coords), shape=(self.choose.shape[0], total))
        constraints: list[Any] = [LinearConstraint(csr_array(choose), 1, 1)]
        for index, metric in enumerate(names):
            row = np.zeros(total)
            row[: self.size] = self._row(metric) / scale[metric]
            row[self.size + index] = -1.0
            constraints.append(LinearConstraint(row[None, :], -np.inf, limits[metric] / scale[metric]))
        weights = np.concatenate([np.zeros(self.size), np.ones(len(names))])
        upper = np.concatenate([np.ones(self.size), np.full(len(names), np.inf)])
        result = self._run(weights, constraints, upper, self.size, gap, time_limit_s)
        if result is None:
            raise RuntimeError("HiGHS found no solution of a problem that always has one")
        picks = self._picks(result.x)
        return {m: max(self._at(m, picks) - limits[m], 0.0) for m in names}

    def _at(self, metric: str, picks: tuple[int, ...]) -> float:
        row = self._row(metric)
        return float(sum(row[s + p] for s, p in zip(self.starts, picks, strict=False)))

    def _picks(self, x: Array) -> tuple[int, ...]:
        return tuple(int(np.argmax(x[a:b])) for a, b in zip(self.starts, self.starts[1:], strict=False))

    def _run(
        self, weights: Array, constraints: list[Any], upper: Array, binaries: int, gap: float, limit: float | None
    ) -> Any:
        integrality = np.zeros(len(weights), dtype=np.int64)
        integrality[:binaries] = 1
        options: Any = {"mip_rel_gap": gap}
        if limit is not None:
            options["time_limit"] = limit
        result = milp(
            weights, constraints=constraints, bounds=Bounds(0, upper), integrality=integrality, options=options
        )
        if result.status == _INFEASIBLE:
            return None
        if result.x is None:
            if result.status == _LIMIT:
                raise TimeoutError(f"HiGHS found no plan within {limit:.0f} s")
            raise RuntimeError(f"HiGHS: {result.message}")
        return result
