"""The rank problem: one choice per site, several budgets, least error. Arrays and names only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from passes.core.site import Array


@dataclass(frozen=True)
class Option:
    """One candidate of a site. ``costs`` by metric, in the metric's own unit; ``error`` is the predicted loss.

    ``format`` is "dense" for the layer as it is. The other formats are names of the registry.
    """

    format: str
    rank: tuple[int, ...]
    costs: dict[str, float]
    error: float


@dataclass(frozen=True)
class SiteOptions:
    """A site and its candidates; the dense one is always among them."""

    site: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class RankProblem:
    """Minimise the sum of errors (or of ``objective``'s metric) with every budget kept.

    ``fixed``: what the rest of the network costs, by metric. ``budgets``: absolute limits by metric.
    ``objective``: "error", or a metric to minimise while the summed error stays under ``error_limit``.
    """

    sites: tuple[SiteOptions, ...]
    fixed: dict[str, float]
    budgets: dict[str, float]
    objective: str = "error"
    error_limit: float | None = None

    def digest(self) -> str:
        """sha256 over everything that a solver sees; a plan carries it."""
        text = json.dumps(
            [
                [
                    [site.site, [[o.format, o.rank, sorted(o.costs.items()), o.error] for o in site.options]]
                    for site in self.sites
                ],
                sorted(self.fixed.items()),
                sorted(self.budgets.items()),
                self.objective,
                self.error_limit,
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def costs(self, metric: str) -> list[Array]:
        """The metric of every option, an array per site."""
        return [np.array([o.costs[metric] for o in s.options]) for s in self.sites]

    def total(self, picks: tuple[int, ...], metric: str) -> float:
        """The metric of the network under ``picks``, an option index per site; metric may be "error"."""
        chosen = [s.options[p] for s, p in zip(self.sites, picks, strict=True)]
        if metric == "error":
            return float(sum(o.error for o in chosen))
        return float(sum(o.costs[metric] for o in chosen) + self.fixed.get(metric, 0.0))


@dataclass(frozen=True)
class RankPlan:
    """A solver's answer.

    ``picks``: an option index per site. ``status``: "optimal", "feasible" (a limit stopped the proof), or "infeasible":
    then ``picks`` is the plan that misses the budgets least and ``out_of_reach`` gives, for each budget that cannot be
    met even on its own, the least value that any plan reaches. ``bound`` is proven: no plan has a lower objective.
    ``preferences``: a loss for every option of every site where a search has learned them, to choose by again.
    """

    solver: str
    status: str
    picks: tuple[int, ...]
    objective: float
    bound: float
    problem: str
    out_of_reach: dict[str, float] = field(default_factory=dict)
    preferences: tuple[tuple[float, ...], ...] = ()

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 when proven optimal."""
        if self.objective <= self.bound:
            return 0.0
        return (self.objective - self.bound) / max(abs(self.objective), 1e-12)


class RankSolver(Protocol):
    """Pure: the same problem gives the same plan."""

    @property
    def name(self) -> str: ...

    def solve(self, problem: RankProblem, time_limit_s: float | None = None) -> RankPlan: ...


def undominated(options: list[Option], metrics: tuple[str, ...]) -> list[Option]:
    """The options that no other one beats or equals in every cost and in error; of equals, the first stays."""
    if not options:
        return []
    table = np.array([[*(o.costs[m] for m in metrics), o.error] for o in options])
    order = np.lexsort(table.T[::-1])
    kept: list[int] = []
    for index in order:
        if not kept or not (table[kept] <= table[index]).all(axis=1).any():
            kept.append(int(index))
    return [options[i] for i in sorted(kept)]


def as_json(plan: RankPlan, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan as it is written to plan.json: the proof, the digest of the problem, and the choice of each layer."""
    return {
        "schema": 1,
        "solver": plan.solver,
        "status": plan.status,
        "objective": plan.objective,
        "bound": plan.bound,
        "gap": plan.gap,
        "problem": plan.problem,
        "layers": layers,
    }
