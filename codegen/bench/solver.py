"""The rank solver on random problems: time and proven gap at full size, brute force at small size."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np

from codegen.bench.benchmark import Table
from codegen.events import Events
from passes.ranks.milp import MilpSolver
from passes.ranks.problem import Option, RankProblem, SiteOptions

METRICS = ("latency", "energy", "params")


@dataclass(frozen=True)
class Solver:
    """``problems`` large problems of ``sites`` x ``choices``; ``small`` small ones held against brute force."""

    sites: int = 160
    choices: int = 64
    problems: int = 5
    small: int = 40
    seed: int = 0

    name: ClassVar[str] = "solver"

    def run(self, events: Events) -> dict[str, Any]:
        """Seconds, objective, bound and gap per large problem; how many small ones equal brute force."""
        solver = MilpSolver()
        rows, held = [], []
        rng = np.random.default_rng(self.seed)
        with events.stage("large problems", self.problems) as progress:
            for index in range(self.problems):
                problem = random_problem(rng, self.sites, self.choices, float(rng.uniform(0.45, 0.85)))
                started, cpu = time.perf_counter(), time.process_time()
                plan = solver.solve(problem, 60)
                seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
                met = all(problem.total(plan.picks, m) <= limit for m, limit in problem.budgets.items())
                rows.append(
                    {"problem": index, "seconds": seconds, "cpu_seconds": cpu_seconds, "status": plan.status,
                     "objective": plan.objective, "bound": plan.bound, "gap": plan.gap, "budgets_met": met}
                )  # fmt: skip
                progress.advance()
        with events.stage("small problems", self.small) as progress:
            for _ in range(self.small):
                problem = random_problem(rng, 5, 6, float(rng.uniform(0.3, 0.9)))
                best = _brute_force(problem)
                plan = solver.solve(problem, 60)
                if best is None:
                    held.append(plan.status == "infeasible")
                else:
                    held.append(plan.status != "infeasible" and abs(plan.objective - best) <= 1e-5 * best)
                progress.advance()
        size = {"sites": self.sites, "choices": self.choices, "budgets": list(METRICS)}
        small = {"problems": len(held), "equal_to_brute_force": sum(held), "relative_tolerance": 1e-5}
        return {"size": size, "rows": rows, "small": small, "kinds": {"seconds": "measured"}}

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        size, small = result["size"], result["small"]
        rows = tuple(
            (
                str(row["problem"]),
                f"{row['seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}",
                row["status"],
                f"{row['objective']:.6g}",
                f"{row['bound']:.6g}",
                f"{row['gap']:.1e}",
            )
            for row in result["rows"]
        )
        title = f"{size['sites']} sites x {size['choices']} choices x {len(size['budgets'])} budgets"
        against = (str(small["problems"]), str(small["equal_to_brute_force"]))
        return [
            Table(title, ("problem", "seconds", "CPU seconds", "status", "objective", "bound", "gap"), rows),
            Table("5 sites x 6 choices, every plan tried", ("problems", "equal to brute force"), (against,)),
        ]


def random_problem(rng: np.random.Generator, sites: int, choices: int, level: float) -> RankProblem:
    """A problem with the shape of a real one: latencies climb in steps, errors are what a falling spectrum leaves.

    Each site has the dense option and ``choices - 1`` chains of two kinds that differ in cost per rank and in how fast
    their spectra fall. ``level``: each budget is about this fraction of the dense network's.
    """
    layers = []
    for index in range(sites):
        scale = float(rng.lognormal(0, 1))
        weight = float(rng.lognormal(0, 1))
        dense = {"latency": 1000 * scale, "energy": 800 * scale * float(rng.uniform(0.7, 1.3)), "params": 64 * 64 * 9.0}
        options = [Option("dense", (), dense, 0.0)]
        for kind in ("svd", "tucker2"):
            count = (choices - 1) // 2 + (kind == "svd") * ((choices - 1) % 2)
            decay, slope = rng.uniform(1.5, 6), rng.uniform(1.1, 2.5)
            step = int(rng.integers(2, max(3, count // 4 + 1)))
            for rank in range(1, count + 1):
                part = rank / count * 0.9 / slope  # ranks up to where the chain costs as much as the layer
                stair = -(-rank // step) * step / count * 0.9 / slope
                costs = {
                    "latency": float(dense["latency"] * min(0.05 + slope * stair, 0.99)),
                    "energy": float(dense["energy"] * (0.05 + slope * part)),
                    "params": float(dense["params"] * slope * part),
                }
                # the discarded tail of an exponential spectrum, with some noise
                tail = (np.exp(-decay * part) - np.exp(-decay)) / (1 - np.exp(-decay))
                options.append(Option(kind, (rank,), costs, float(weight * tail * rng.uniform(0.9, 1.1))))
        layers.append(SiteOptions(f"site{index}", tuple(options)))
    fixed = {m: 0.05 * sum(s.options[0].costs[m] for s in layers) for m in METRICS}
    dense_total = {m: fixed[m] + sum(s.options[0].costs[m] for s in layers) for m in METRICS}
    budgets = {m: dense_total[m] * level * float(rng.uniform(0.95, 1.15)) for m in METRICS}
    return RankProblem(tuple(layers), fixed, budgets)


def _brute_force(problem: RankProblem) -> float | None:
    """The least error of all plans that keep the budgets; None where there is none."""
    best = None
    for picks in product(*(range(len(s.options)) for s in problem.sites)):
        if all(problem.total(picks, m) <= limit for m, limit in problem.budgets.items()):
            error = problem.total(picks, "error")
            best = error if best is None else min(best, error)
    return best
