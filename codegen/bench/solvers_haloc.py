"""Exact solver against rank search by gradient: equal latency, same candidates, the same correction, no recovery.

Rows per budget: the exact solver as ``lower`` runs it (several weightings of the predicted errors, each plan carried
out, the best one kept); the distribution that the search by gradient starts from, untrained; and what it has learned.
Accuracies are those of the written files in onnxruntime on training images that no part of the search has seen; the
test set is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from codegen.bench.benchmark import DATA, MODELS, Table, existing
from codegen.bench.cifar10 import CALIBRATION, images, top1
from codegen.events import Events
from passes import registry
from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.search import Attempt

Array = NDArray[Any]

MODEL = "resnet20_cifar10.onnx"
HELD_OUT = "train_3.npz"

ROWS = {"milp": "exact", "start": "haloc, untrained", "haloc": "haloc"}


@dataclass(frozen=True)
class SolversHaloc:
    """``calibration`` images are the first of train_0.npz, ``samples`` for the search those after them; ``images``
    to judge by are the last of train_3.npz. Budgets are percentages of the dense network's latency."""

    models: Path = MODELS
    data: Path = DATA
    budgets: tuple[int, ...] = (70, 50)
    target: str = "asic"
    effort: str = "default"
    calibration: int = 1000
    samples: int = 4000
    images: int = 5000
    seed: int = 0

    name: ClassVar[str] = "solvers-haloc"

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError("--samples: the search needs two images, one for the ranks and one for the weights")

    def run(self, events: Events) -> dict[str, Any]:
        """Rows of budget, solver, loss, accuracy, latency and seconds; the dense network first.

        ``seconds`` are those of search and correction, ``shared_seconds`` what all rows build on: candidates, prices,
        statistics. ``same``: the share of layers with the exact solver's choice.
        """
        model = existing(self.models / MODEL, "--models", "ResNet-20 for CIFAR-10")
        held = images(self.data, HELD_OUT, -self.images, None)
        x, y = images(self.data, CALIBRATION, 0, self.calibration + self.samples)
        if len(x) < self.calibration + 2:
            raise UsageError(f"{CALIBRATION} has {len(x)} images: too few for {self.calibration} and a search")
        with TemporaryDirectory() as folder:
            bench = _Bench(self, model, x, y, held, Path(folder), events)
            with events.stage("evaluate the dense network"):
                dense = top1(model, *held)
            rows = [
                {"row": "dense", "budget_percent": None, "latency_ratio": 1.0, "accuracy": dense, "loss": 0.0,
                 "macs": bench.opened.before.macs, "seconds": None, "same": None}
            ]  # fmt: skip
            for budget in self.budgets:
                rows.extend(bench.rows(budget))
        return {
            "rows": rows, "shared_seconds": bench.shared_seconds, "held_out": len(held[0]),
            "calibration_images": min(len(x), self.calibration), "search_images": len(x) - self.calibration,
            "kinds": {"latency": bench.opened.before.kind.value, "accuracy": "measured", "seconds": "measured"},
        }  # fmt: skip

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        rows = []
        for row in result["rows"]:
            dense = row["row"] == "dense"
            rows.append(
                (
                    "dense" if dense else ROWS[row["row"]],
                    "-" if dense else f"{row['budget_percent']} %",
                    f"{100 * row['latency_ratio']:.1f} %",
                    f"{row['macs'] / 1e6:.2f}M",
                    "-" if dense else f"{row['loss']:.4f}",
                    f"{100 * row['accuracy']:.2f} %",
                    "-" if dense else f"{row['seconds']:.0f}",
                    "-" if dense else f"{100 * row['same']:.0f} %",
                )
            )
        columns = (
            "solver", "budget", f"latency ({result['kinds']['latency']})", "MACs", "calibration loss",
            "held-out top-1", "seconds", "same as exact",
        )  # fmt: skip
        title = (
            f"ResNet-20, {self.target}, {result['held_out']} held-out training images, before recovery; "
            f"{result['shared_seconds']:.0f} s of pricing and statistics serve all rows"
        )
        return [Table(title, columns, tuple(rows))]


class _Bench:
    """One network, and what its rows share."""

    def __init__(
        self,
        options: SolversHaloc,
        model: Path,
        x: Array,
        y: Array,
        held: tuple[Array, Array],
        folder: Path,
        events: Events,
    ) -> None:
        from threadpoolctl import threadpool_limits

        from codegen.bench.network import opened
        from codegen.space import EFFORTS
        from passes.training.data import TrainingSet

        self.options, self.held, self.folder, self.events = options, held, folder, events
        self.opened = opened(model, options.target)
        self.effort = EFFORTS[options.effort]
        self.correction = self.effort.correction(options.seed)
        self.feeds = {self.opened.input: x[: options.calibration]}
        self.data = TrainingSet.of({self.opened.input: x[options.calibration :]}, y[options.calibration :])
        started = time.perf_counter()
        with threadpool_limits(limits=1, user_api="blas"):
            self.space = self.opened.space(self.feeds, self.effort, self.correction, events)
        self.shared_seconds = time.perf_counter() - started

    def rows(self, budget: int) -> list[dict[str, Any]]:
        from threadpoolctl import threadpool_limits

        found: list[dict[str, Any]] = []
        exact: Attempt | None = None
        for row in ROWS:
            started = time.perf_counter()
            with self.events.stage(f"{ROWS[row]}, {budget} %"), threadpool_limits(limits=1, user_api="blas"):
                attempt = self._attempt(row, {"latency": self.opened.before.latency * budget / 100})
            seconds = time.perf_counter() - started
            exact = exact or attempt
            path = self.folder / f"{row}-{budget}.onnx"
            cost = self.opened.written(attempt.chains, path)
            same = [attempt.choices[name] == choice for name, choice in exact.choices.items()]
            found.append(
                {"row": row, "budget_percent": budget, "latency_ratio": cost.latency / self.opened.before.latency,
                 "met": cost.latency <= self.opened.before.latency * budget / 100 * (1 + 1e-9), "macs": cost.macs,
                 "loss": attempt.loss, "accuracy": top1(path, *self.held), "seconds": seconds,
                 "predicted_error": attempt.plan.objective, "same": float(np.mean(same)),
                 "layers": {n: ["dense" if c.format is None else c.format.name, list(c.rank)]
                            for n, c in attempt.choices.items()}}
            )  # fmt: skip
        return found

    def _attempt(self, row: str, limits: dict[str, float]) -> Attempt:
        from codegen.search import best_within_budgets
        from codegen.searching import Search

        stepper = self.opened.stepper
        solver: Any = registry.SOLVERS.load("milp" if row == "milp" else "haloc")
        if row == "milp":
            attempt, _ = best_within_budgets(
                self.space, solver, limits, stepper, self.feeds, self.correction, self.effort, lambda: False,
                self.events,
            )  # fmt: skip
            return attempt
        effort: Any = self.options.effort
        search = Search(
            solver, self.space, self.opened.network, self.data, stepper, self.feeds, self.correction, self.effort,
            effort, self.options.seed, self.events,
        )  # fmt: skip
        attempt, _ = search.run(limits, 0.0 if row == "start" else None)
        return attempt
