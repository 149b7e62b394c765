"""Which cheap number tells how much a network loses: error models against the joint KL of ResNet-20's output.

Plans are carried out twice: with factors whitened layer by layer, and with sequential correction. Their true loss is
the mean KL divergence of the output from the dense network's, on calibration images that the factors never saw. Each
error model adds up one number per chosen candidate; what counts is whether it puts plans in the right order, since that
is all a solver makes of it. Two families of plans: random candidates at all latencies, most of them worse than anything
a solver would choose; and plans of one latency that a solver made under random weights of the sites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from codegen.bench.benchmark import DATA, MODELS, Table, existing
from codegen.bench.cifar10 import CALIBRATION, images
from codegen.bench.ptq_resnet20 import MODEL
from codegen.events import Events
from passes.errors import UsageError

Array = NDArray[Any]

FAMILIES = {"random": "random plans", "solved": "plans of one budget, sites weighted at random"}
TRUTHS = {"whitened": "with whitened factors", "corrected": "after sequential correction"}


@dataclass(frozen=True)
class ErrorModels:
    """``plans`` of each family, ``corrected`` of them also with sequential correction; random ones are drawn from a
    ``pool`` of candidates per site.

    Factors and error models are made on the first ``statistics`` images of train_0.npz, the true KL is that of the
    ``held_out`` images after them. Of the former, ``reacting`` serve the gradients and ``probing`` the single-layer KL.
    """

    models: Path = MODELS
    data: Path = DATA
    target: str = "asic"
    effort: str = "quick"
    plans: int = 40
    corrected: int = 20
    pool: int = 12
    statistics: int = 700
    held_out: int = 300
    reacting: int = 256
    probing: int = 128
    resamples: int = 1000
    seed: int = 0

    name: ClassVar[str] = "error-models"

    def __post_init__(self) -> None:
        if not 0 <= self.corrected <= self.plans:
            raise UsageError(f"--corrected {self.corrected}: at most the number of plans, {self.plans}")
        if self.corrected in (1, 2):
            raise UsageError(f"--corrected {self.corrected}: a rank correlation needs at least 3 plans")

    def run(self, events: Events) -> dict[str, Any]:
        """Rank correlations with bootstrap intervals, what each error model cost, and the plans themselves."""
        from threadpoolctl import threadpool_limits

        from codegen.bench.plan_losses import PlanLosses

        model = existing(self.models / MODEL, "--models", "ResNet-20 for CIFAR-10")
        x, _ = images(self.data, CALIBRATION, 0, self.statistics + self.held_out)
        with threadpool_limits(limits=1, user_api="blas"):
            losses = PlanLosses(self, model, x[: self.statistics], x[self.statistics :], events)
            with events.stage("choose plans"):
                plans = [*losses.random_plans(self.plans), *losses.solved_plans(self.plans)]
            rows: list[dict[str, Any]] = []
            with events.stage("carry out plans", len(plans)) as progress:
                for index, plan in enumerate(plans):
                    kl = {"whitened": losses.whitened(plan)}
                    if index % self.plans < self.corrected:
                        kl["corrected"] = losses.corrected(plan)
                    rows.append({"family": plan.family, "latency_ratio": plan.latency_ratio, "kl": kl, "predicted": {}})
                    progress.advance()
            for name, model_of in losses.models().items():
                with events.stage(f"error model: {name}"):
                    for row, plan in zip(rows, plans, strict=True):
                        row["predicted"][name] = float(sum(model_of(*pick) for pick in plan.picks))
        names = list(rows[0]["predicted"])
        return {
            "correlations": [
                found
                for family in FAMILIES
                for truth in TRUTHS
                for name in names
                if (found := self._correlation(rows, family, truth, name))
            ],
            "costs": losses.costs(names),
            "plans": rows,
            "kinds": {"latency": losses.kind, "kl": "measured", "seconds": "measured"},
        }

    def _correlation(
        self, rows: Sequence[Mapping[str, Any]], family: str, truth: str, name: str
    ) -> dict[str, Any] | None:
        chosen = [row for row in rows if row["family"] == family and truth in row["kl"]]
        pairs = [(row["predicted"][name], row["kl"][truth]) for row in chosen]
        if not pairs:
            return None
        predicted, true = np.array(pairs).T
        found: dict[str, Any] = {"family": family, "truth": truth, "model": name, "plans": len(pairs)}
        for statistic in ("spearman", "kendall"):
            found[statistic] = rank_correlation(predicted, true, statistic, self.resamples, self.seed)
        return found

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        tables = []
        for family, truth in product(FAMILIES, TRUTHS):
            found = [row for row in result["correlations"] if (row["family"], row["truth"]) == (family, truth)]
            if found:
                rows = tuple((row["model"], _interval(row["spearman"]), _interval(row["kendall"])) for row in found)
                plans = [row for row in result["plans"] if row["family"] == family and truth in row["kl"]]
                kls, ratios = [row["kl"][truth] for row in plans], [row["latency_ratio"] for row in plans]
                title = (
                    f"{len(plans)} {FAMILIES[family]}, latency {min(ratios):.0%} to {max(ratios):.0%}; "
                    f"true KL {TRUTHS[truth]}: {min(kls):.3g} to {max(kls):.3g}"
                )
                tables.append(Table(title, ("sum over layers of", "Spearman (95 %)", "Kendall (95 %)"), rows))
        costs = tuple(
            (row["model"], f"{row['once_s']:.1f}", f"{1000 * row['per_candidate_s']:.1f}", f"{row['network_s']:.0f}")
            for row in result["costs"]
        )
        count = result["costs"][0]["candidates"]
        columns = ("error model", "once, s", "per candidate, ms", f"{count} candidates, s (extrapolated)")
        tables.append(Table("cost (measured on the candidates that the plans use)", columns, costs))
        return tables


def rank_correlation(a: Array, b: Array, statistic: str, resamples: int, seed: int) -> dict[str, float | None]:
    """Spearman's rho or Kendall's tau of two samples, with the percentile bootstrap's 95 % interval over pairs.

    None where it is not defined: one of the samples is constant.
    """
    measure = {"spearman": spearman, "kendall": kendall}[statistic]
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"value": None, "low": None, "high": None}
    index = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    drawn = measure(a[index], b[index])
    low, high = np.nanpercentile(drawn, [2.5, 97.5])  # a resample of one plan alone has no order
    return {"value": float(measure(a[None], b[None])[0]), "low": float(low), "high": float(high)}


def spearman(a: Array, b: Array) -> Array:
    """Spearman's rho of each row of (r, n) with the same row of another: (r,); NaN for a constant row."""
    from scipy.stats import rankdata

    ranks = [rankdata(x, axis=1) for x in (a, b)]
    x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    return _ratio((x * y).sum(1), np.sqrt((x * x).sum(1) * (y * y).sum(1)))


def kendall(a: Array, b: Array) -> Array:
    """Kendall's tau-b of each row of (r, n) with the same row of another: (r,); NaN for a constant row."""
    x, y = (np.sign(v[:, :, None] - v[:, None, :]).reshape(len(v), -1) for v in (a, b))
    return _ratio((x * y).sum(1), np.sqrt((x * x).sum(1) * (y * y).sum(1)))


def _ratio(above: Array, below: Array) -> Array:
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0))


def _interval(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "-"
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


class Stopwatch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def timed(self, name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = action()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.calls[name] = self.calls.get(name, 0) + 1
        return result

    def each(self, name: str) -> float:
        """Mean seconds of a call; 0 where there was none."""
        return self.seconds.get(name, 0.0) / max(self.calls.get(name, 0), 1)
