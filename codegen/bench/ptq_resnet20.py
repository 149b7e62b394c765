"""ResNet-20 on CIFAR-10 without training: latency budget against accuracy, from uniform ranks to the whole pipeline.

The rows: (a) uniform ranks with factors of the weights alone; (b) ranks by the exact solver, errors and factors still
of the weights alone; (c) errors and factors whitened on calibration images, each layer fitted for itself; (d) what
``lower`` does. Accuracies are those of the written model.onnx in onnxruntime. Test images serve for them alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from codegen.bench.benchmark import DATA, MODELS, Table, existing
from codegen.bench.cifar10 import CALIBRATION, TEST, images, top1
from codegen.events import Events
from passes.core.cost import Cost
from passes.errors import UsageError
from passes.ranks.problem import RankSolver

if TYPE_CHECKING:
    from codegen.space import Effort, Space
    from passes.core.moments import Moments
    from passes.correct import Correction

Array = NDArray[Any]

MODEL = "resnet20_cifar10.onnx"

ROWS = {
    "a": "uniform ranks, data-free",
    "b": "solver, data-free",
    "c": "solver, whitened",
    "d": "lower",
}


@dataclass(frozen=True)
class PtqResnet20:
    """``calibration`` images are the first of train_0.npz; ``images`` None evaluates on all of test.npz."""

    models: Path = MODELS
    data: Path = DATA
    rows: str = "abcd"
    budgets: tuple[int, ...] = (90, 80, 70, 60, 50)
    target: str = "asic"
    effort: str = "default"
    calibration: int = 1000
    images: int | None = None
    seed: int = 0

    name: ClassVar[str] = "ptq-resnet20"

    def __post_init__(self) -> None:
        if not self.rows or set(self.rows) - set(ROWS):
            raise UsageError(f"--rows {self.rows!r}: write any of {', '.join(ROWS)} together, such as acd")

    def run(self, events: Events) -> dict[str, Any]:
        """Rows of budget, latency, MACs, accuracy and seconds; the dense network first.

        ``seconds`` is everything from the read network to the written one, statistics included, though (a) to (c)
        collect those once for all their budgets; the evaluation is not in it.
        """
        model = existing(self.models / MODEL, "--models", "ResNet-20 for CIFAR-10")
        test = images(self.data, TEST, 0, self.images)
        x, _ = images(self.data, CALIBRATION, 0, self.calibration)
        with TemporaryDirectory() as folder:
            bench = _Bench(self, model, x, Path(folder), events)
            with events.stage("evaluate the dense network"):
                dense = top1(model, *test)
            rows = [_row("dense", None, bench.before, bench.before, dense, None)]
            for row in sorted(set(self.rows)):
                for budget in self.budgets:
                    with events.stage(f"row {row}, {budget} %"):
                        cost, seconds, written = bench.carry_out(row, budget)
                        accuracy = top1(written, *test)
                    rows.append(_row(row, budget, bench.before, cost, accuracy, seconds))
        kinds = {"latency": bench.before.kind.value, "macs": "counted", "accuracy": "measured", "seconds": "measured"}
        return {"rows": rows, "kinds": kinds, "evaluated": len(test[0]), "calibration_images": len(x)}

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        rows = []
        for row in result["rows"]:
            what = row["row"] if row["row"] == "dense" else f"({row['row']}) {ROWS[row['row']]}"
            rows.append(
                (
                    what,
                    "-" if row["budget_percent"] is None else f"{row['budget_percent']} %",
                    f"{row['latency']:,.0f}",
                    f"{100 * row['latency_ratio']:.1f} %",
                    f"{row['macs'] / 1e6:.2f}M",
                    f"{100 * row['accuracy']:.2f} %",
                    "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
                )
            )
        kinds = result["kinds"]
        columns = (
            "row", "budget", f"{result['rows'][0]['unit']} ({kinds['latency']})", "of dense", "MACs",
            f"top-1 ({kinds['accuracy']})", "seconds",
        )  # fmt: skip
        title = f"ResNet-20, {self.target}, {result['evaluated']} test images, no training"
        return [Table(title, columns, tuple(rows))]


def _row(
    row: str, budget: int | None, before: Cost, cost: Cost, accuracy: float, seconds: float | None
) -> dict[str, Any]:
    return {
        "row": row,
        "budget_percent": budget,
        "latency": cost.latency,
        "unit": cost.unit,
        "latency_ratio": cost.latency / before.latency,
        "met": budget is None or cost.latency <= before.latency * budget / 100 * (1 + 1e-9),
        "macs": cost.macs,
        "accuracy": accuracy,
        "seconds": seconds,
    }


class _Bench:
    """One network, and what its rows share."""

    def __init__(self, options: PtqResnet20, model: Path, x: Array, folder: Path, events: Events) -> None:
        from codegen.bench.network import opened

        self.options, self.model, self.x, self.folder, self.events = options, model, x, folder, events
        self.opened = opened(model, options.target)
        self.before = self.opened.before
        self._spaces: dict[bool, tuple[Space, dict[str, Moments], float]] = {}

    def carry_out(self, row: str, budget: int) -> tuple[Cost, float, Path]:
        """Price, seconds and file of one network."""
        from passes.ranks.milp import MilpSolver
        from passes.ranks.uniform import UniformSolver

        rows: dict[str, Callable[[int], tuple[Cost, float, Path]]] = {
            "a": lambda limit: self._layerwise(UniformSolver(), False, limit),
            "b": lambda limit: self._layerwise(MilpSolver(), False, limit),
            "c": lambda limit: self._layerwise(MilpSolver(), True, limit),
            "d": self._lowered,
        }
        return rows[row](budget)

    def _layerwise(self, solver: RankSolver, whitened: bool, budget: int) -> tuple[Cost, float, Path]:
        from threadpoolctl import threadpool_limits

        from codegen.search import affordable
        from codegen.walks import plain_chain, whitened_chain

        with threadpool_limits(limits=1, user_api="blas"):
            space, moments, shared = self._space(whitened)
            started = time.perf_counter()
            limit = self.before.latency * budget / 100
            attempt, _ = affordable(space, solver, {"latency": limit}, {}, self._effort())
            chains = {}
            for site in space.sites:
                choice = attempt.choices[site.name]
                if choice.format is None:
                    continue
                if whitened:
                    chains[site.name] = whitened_chain(site, choice, moments[site.name], self._correction().ridge)
                else:
                    chains[site.name] = plain_chain(site, choice)
            path = self.folder / f"{solver.name}-{whitened}-{budget}.onnx"
            cost = self.opened.written(chains, path)
        return cost, shared + time.perf_counter() - started, path

    def _effort(self) -> Effort:
        """The effort without what only row (d) has: output metrics and measured sensitivities."""
        from codegen.space import EFFORTS

        return replace(EFFORTS[self.options.effort], macs=0.0)

    def _correction(self) -> Correction:
        return self._effort().correction(self.options.seed)

    def _space(self, whitened: bool) -> tuple[Space, dict[str, Moments], float]:
        """The search space with errors of the weights, or whitened ones; moments; the seconds that making it took."""
        from passes.sensitivity import moments_by_site

        if whitened not in self._spaces:
            started = time.perf_counter()
            effort, correction = self._effort(), self._correction()
            feeds = {self.opened.input: self.x} if whitened else None
            space = self.opened.space(feeds, effort, correction, self.events)
            seconds = time.perf_counter() - started
            moments: dict[str, Moments] = {}
            if feeds is not None:
                # the space keeps no moments; collecting them a second time is no part of the method's own time
                moments, _ = moments_by_site(self.opened.stepper, feeds, effort.elements, correction.seed)
            self._spaces[whitened] = (space, moments, seconds)
        return self._spaces[whitened]

    def _lowered(self, budget: int) -> tuple[Cost, float, Path]:
        from codegen.config import LowerConfig
        from codegen.driver import lower
        from passes.onnx_graph import OnnxGraph

        calibration = self.folder / "calibration.npz"
        if not calibration.exists():
            np.savez(calibration, x=self.x)  # a network of one input takes x for it
        output = self.folder / f"lowered-{budget}"
        config = LowerConfig.from_values(
            {"model": self.model, "target": self.options.target, "budgets": {"latency": f"{budget}%"},
             "calib": str(calibration), "samples": None, "effort": self.options.effort, "seed": self.options.seed,
             "output": output}
        )  # fmt: skip
        started = time.perf_counter()
        lower(config, self.events)
        seconds = time.perf_counter() - started
        written = output / "model.onnx"
        # priced from the written file, like the other rows, and not from what the report says of it
        return self.opened.target.latency.network(OnnxGraph.read(written).workload()), seconds, written
