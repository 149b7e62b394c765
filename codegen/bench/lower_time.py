"""How long ``lower`` takes, stage by stage: ResNet-20, and the ResNet-50 architecture with random weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from codegen.bench.benchmark import DATA, MODELS, Table, existing
from codegen.bench.cifar10 import CALIBRATION, images
from codegen.bench.ptq_resnet20 import MODEL
from codegen.bench.resnet50 import write_random
from codegen.events import Events
from codegen.report.numbers import quantity
from passes.errors import UsageError

NETWORKS = ("resnet20", "resnet50")


@dataclass(frozen=True)
class LowerTime:
    """Calibration: ResNet-20 with the first ``calibration`` images of train_0.npz, ResNet-50 with ``noise`` images of
    Gaussian noise, since its weights are random as well."""

    models: Path = MODELS
    data: Path = DATA
    networks: tuple[str, ...] = NETWORKS
    target: str = "asic"
    effort: str = "default"
    latency: str = "60%"
    calibration: int = 1000
    noise: int = 128
    seed: int = 0

    name: ClassVar[str] = "lower-time"

    def __post_init__(self) -> None:
        unknown = [name for name in self.networks if name not in NETWORKS]
        if unknown or not self.networks:
            raise UsageError(f"--networks {','.join(self.networks)!r}: write any of {', '.join(NETWORKS)}")

    def run(self, events: Events) -> dict[str, Any]:
        """Seconds per stage and in all, and what the run reached."""
        from codegen.config import LowerConfig
        from codegen.driver import lower

        runs = []
        with TemporaryDirectory() as name:
            folder = Path(name)
            for network in self.networks:
                model, calibration = self._inputs(network, folder)
                config = LowerConfig.from_values(
                    {"model": model, "target": self.target, "budgets": {"latency": self.latency},
                     "calib": str(calibration), "effort": self.effort, "seed": self.seed, "output": folder / network}
                )  # fmt: skip
                started, cpu = time.perf_counter(), time.process_time()
                result = lower(config, events)
                seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
                report = result.report
                runs.append(
                    {
                        "network": network,
                        "seconds": seconds,
                        "cpu_seconds": cpu_seconds,  # the compiling child process apart
                        "stages": report["timings"],
                        "met": not result.missed,
                        "calibration": report["output_error"]["samples"],
                        "baseline": report["baseline"]["latency"],
                        "result": report["result"]["latency"],
                    }
                )
        return {"runs": runs, "kinds": {"seconds": "measured"}}

    def _inputs(self, network: str, folder: Path) -> tuple[Path, Path]:
        """The network's file and that of its calibration data."""
        calibration = folder / f"{network}.npz"
        if network == "resnet20":
            model = existing(self.models / MODEL, "--models", "ResNet-20 for CIFAR-10")
            x, _ = images(self.data, CALIBRATION, 0, self.calibration)
        else:
            model = folder / "resnet50.onnx"
            write_random(model, self.seed)
            rng = np.random.default_rng(self.seed)
            x = rng.standard_normal((self.noise, 3, 224, 224), dtype=np.float32)
        np.savez(calibration, x=x)
        return model, calibration

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        tables = []
        for run in result["runs"]:
            before, after = (quantity(run[key]["value"], run[key]["unit"]) for key in ("baseline", "result"))
            rows = [(stage, f"{seconds:.1f}") for stage, seconds in run["stages"].items()]
            title = (
                f"{run['network']}, {run['calibration']} calibration samples: {before} to {after} "
                f"({run['result']['kind']}), budget {self.latency} {'met' if run['met'] else 'missed'}"
            )
            rows += [("in all", f"{run['seconds']:.1f}"), ("CPU time of it", f"{run['cpu_seconds']:.1f}")]
            tables.append(Table(title, ("stage", "seconds"), tuple(rows)))
        return tables
