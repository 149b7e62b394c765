"""ResNet-20 on this processor: what budgets bought, in one timed run of every binary beside onnxruntime.

``lower`` runs once for each budget, and a second time for the first one, from the trials of the first run. Then all
binaries and onnxruntime on all networks take turns in one process on one core.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from codegen.bench.benchmark import DATA, MODELS, Table, existing
from codegen.bench.cifar10 import CALIBRATION, TEST, images, top1
from codegen.bench.ptq_resnet20 import MODEL
from codegen.events import Events
from passes.errors import UsageError


@dataclass(frozen=True)
class CpuResnet20:
    """``limits`` are budgets, written metric=limit. ``database``: the file of trials; None starts with an empty one."""

    models: Path = MODELS
    data: Path = DATA
    limits: tuple[str, ...] = ("latency=50%", "macs=28%")
    database: Path | None = None
    effort: str = "default"
    calibration: int = 1000
    images: int | None = None
    seed: int = 0

    name: ClassVar[str] = "cpu-resnet20"

    def __post_init__(self) -> None:
        if not self.limits or any("=" not in budget for budget in self.limits):
            raise UsageError(f"--limits {','.join(self.limits)!r}: write metric=limit, such as latency=50%")

    def run(self, events: Events) -> dict[str, Any]:
        """``runs`` of lower, and ``contenders`` with their times in seconds and ratios to onnxruntime on the input."""
        from codegen.bench.cpu_build import tuned_build
        from codegen.cpu_device import device_for
        from codegen.library_timing import time_side_by_side
        from codegen.tune.statistics import CONFIDENCE, ratio, summary

        model = existing(self.models / MODEL, "--models", "ResNet-20 for CIFAR-10")
        test = images(self.data, TEST, 0, self.images)
        x, _ = images(self.data, CALIBRATION, 0, self.calibration)
        with TemporaryDirectory() as name:
            folder = Path(name)
            calibration = folder / "calibration.npz"
            np.savez(calibration, x=x)  # a network of one input takes x for it
            database = self.database or folder / "trials.jsonl"
            runs = [
                self._lowered(model, calibration, database, budget, folder / f"{index}", events)
                for index, budget in enumerate((*self.limits, self.limits[0]))
            ]
            files = {"the input": model} | {b: folder / f"{i}" / "model.onnx" for i, b in enumerate(self.limits)}
            dense = folder / "dense.so"
            untuned = [used.key for used in tuned_build(model, database, dense).workloads if not used.tuned]
            libraries = {"the input": dense} | {b: folder / f"{i}" / "model.so" for i, b in enumerate(self.limits)}
            with events.stage("time the binaries"):
                samples = time_side_by_side(
                    {f"tuned binary, {name}": path for name, path in libraries.items()},
                    {f"onnxruntime, {name}": path for name, path in files.items()},
                    {next(iter(runs[0]["inputs"])): x[:1]},
                    1,
                )
            with events.stage("evaluate", len(files)) as progress:
                accuracy = {}
                for name, path in files.items():
                    accuracy[name] = top1(path, *test)
                    progress.advance(1, name)
        reference = samples["onnxruntime, the input"]
        macs = {"the input": runs[0]["baseline"]["macs"]["value"]}
        macs |= {run["budget"]: run["result"]["macs"]["value"] for run in runs[: len(self.limits)]}
        rows = []
        for name, times in samples.items():
            network = name.partition(", ")[2]
            against = ratio(reference, times, CONFIDENCE)
            rows.append(
                {
                    "name": name,
                    **summary(times.ravel().tolist()).__dict__,
                    "times_faster": against.value,
                    "low": against.low,
                    "high": against.high,
                    "macs": macs[network],
                    "accuracy": accuracy[network],
                }
            )
        kinds = {"seconds": "measured", "accuracy": "measured", "macs": "counted"}
        return {
            "runs": runs, "contenders": rows, "untuned_layers": untuned, "device": device_for({}).model, "kinds": kinds,
            "evaluated": len(test[0]),
        }  # fmt: skip

    def _lowered(
        self, model: Path, calibration: Path, database: Path, budget: str, output: Path, events: Events
    ) -> dict[str, Any]:
        from codegen.config import LowerConfig
        from codegen.driver import lower

        metric, _, limit = budget.partition("=")
        config = LowerConfig.from_values(
            {"model": model, "target": "cpu", "budgets": {metric: limit}, "calib": str(calibration), "seed": self.seed,
             "effort": self.effort, "database": database, "output": output}
        )  # fmt: skip
        started = time.perf_counter()
        result = lower(config, events)
        seconds = time.perf_counter() - started
        report = json.loads((output / "report.json").read_bytes())
        return {
            "budget": budget,
            "seconds": seconds,
            "met": not result.missed,
            **{key: report[key] for key in ("baseline", "result", "budgets", "measurement", "timings")},
            "inputs": [spec.name for spec in _inputs(model)],
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        rows = tuple(
            (
                row["name"],
                f"{1e6 * row['seconds']:,.1f}",
                f"{1e6 * row['p10']:,.1f}",
                f"{row['times_faster']:.2f}",
                f"{row['low']:.2f} to {row['high']:.2f}",
                f"{row['macs'] / 1e6:.2f}M",
                f"{100 * row['accuracy']:.2f} %",
            )
            for row in result["contenders"]
        )
        columns = (
            "program", "us (measured)", "10th percentile", "times faster than onnxruntime", "95 % interval", "MACs",
            f"top-1 ({result['evaluated']} images)",
        )  # fmt: skip
        runs = tuple(
            (
                run["budget"] if index < len(result["runs"]) - 1 else f"{run['budget']}, again",
                f"{1e6 * run['baseline']['latency']['value']:,.1f}",
                f"{1e6 * run['result']['latency']['value']:,.1f}",
                f"{run['result']['latency']['value'] / run['baseline']['latency']['value']:.1%}",
                "yes" if run["met"] else "no",
                f"{run['measurement']['trials']:,}",
                f"{run['seconds']:,.0f}",
            )
            for index, run in enumerate(result["runs"])
        )
        return [
            Table(f"ResNet-20 on {result['device']}, one thread, in turns in one process", columns, rows),
            Table(
                "what lower said",
                ("budget", "input, us", "result, us", "of the input", "met", "trials", "seconds"),
                runs,
            ),
        ]


def _inputs(model: Path) -> Any:
    from passes.onnx_graph import OnnxGraph

    return OnnxGraph.read(model).inputs
