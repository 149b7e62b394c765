"""Whole networks as they are, compiled for this processor, beside onnxruntime: one thread, in turns in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from codegen.bench.benchmark import MODELS, Table
from codegen.events import Events
from passes.errors import InputError, RankcError

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {"yunet_n_dynamic": {"input": (1, 3, 320, 320)}}
"""Of networks with sizes of the user's choice."""


@dataclass(frozen=True)
class CpuNetworks:
    """Every network in the folder ``models``. ``database``: trials to take schedules from; None: the default ones."""

    models: Path = MODELS
    database: Path | None = None
    seed: int = 0

    name: ClassVar[str] = "cpu-networks"

    def run(self, events: Events) -> dict[str, Any]:
        """Seconds of both, their ratio, and the largest difference of an output; or why there is no binary."""
        files = sorted(self.models.glob("*.onnx"))
        if not files:
            raise InputError(f"{self.models}: holds no .onnx file; give another folder with --models DIR")
        rows = []
        with TemporaryDirectory() as name, events.stage("networks", len(files)) as progress:
            for path in files:
                rows.append({"network": path.stem, **self._row(path, Path(name) / "model.so")})
                progress.advance(1, path.stem)
        return {"networks": rows, "kinds": {"seconds": "measured"}}

    def _row(self, path: Path, library: Path) -> dict[str, Any]:
        from codegen.bench.cpu_build import tuned_build
        from codegen.dataset import random_inputs
        from codegen.library_timing import time_side_by_side
        from codegen.tune.statistics import CONFIDENCE, ratio, summary
        from codegen.tvm_check import check_binary
        from passes.onnx_graph import OnnxGraph

        try:
            graph = OnnxGraph.read(path, SHAPES.get(path.stem, {}))
            made = tuned_build(path, self.database, library, graph.input_shapes)
        except RankcError as error:
            return {"reason": str(error)}
        feeds = next(iter(random_inputs(graph.inputs, graph.input_shapes, 1, self.seed).batches(1)))
        found = check_binary(made, path, [feeds])
        samples = time_side_by_side({"ours": library}, {"onnxruntime": path}, feeds, 1)
        against = ratio(samples["ours"], samples["onnxruntime"], CONFIDENCE)
        ours, theirs = (summary(samples[name].ravel().tolist()).seconds for name in ("ours", "onnxruntime"))
        return {
            "seconds": ours,
            "onnxruntime_s": theirs,
            "ratio": against.value,
            "low": against.low,
            "high": against.high,
            "max_abs": found.max_abs,
            "relative_l2": found.relative_l2,
            "untuned": sum(1 for layer in made.workloads if not layer.tuned),
            "kernels": len(made.workloads),
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        rows, without = [], []
        for row in result["networks"]:
            if "reason" in row:
                without.append((row["network"], row["reason"]))
                continue
            rows.append(
                (
                    row["network"],
                    f"{1e3 * row['seconds']:.3f}",
                    f"{1e3 * row['onnxruntime_s']:.3f}",
                    f"{row['ratio']:.2f}",
                    f"{row['low']:.2f} to {row['high']:.2f}",
                    f"{row['max_abs']:.1e}",
                )
            )
        columns = ("network", "ours, ms (measured)", "onnxruntime, ms", "ratio", "95 % interval", "largest difference")
        found = [Table("networks as they are, one thread, in turns in one process", columns, tuple(rows))]
        if without:
            found.append(Table("without a binary", ("network", "reason"), tuple(without)))
        return found
