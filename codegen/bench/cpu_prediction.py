"""Predicted against measured latency of random plans of ResNet-20 on this processor.

Each plan is a network of its own: a random candidate at every layer. Its binary is timed in turns with that of the
network as it came. Two predictions are judged: ``before``, made from the trials that the database happened to hold, and
``after``, when the plan's own kernels were tuned, as they are for every plan that a search ends with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from codegen.bench.benchmark import MODELS, Table, existing
from codegen.bench.ptq_resnet20 import MODEL
from codegen.events import Events, QuietEvents
from passes.errors import UsageError


@dataclass(frozen=True)
class CpuPrediction:
    """``database``: the file of trials that the first prediction stands on and that new ones go to."""

    models: Path = MODELS
    plans: int = 40
    database: Path | None = None
    effort: str = "default"
    seed: int = 0

    name: ClassVar[str] = "cpu-prediction"

    def __post_init__(self) -> None:
        if self.plans < 3:
            raise UsageError(f"--plans {self.plans}: a rank correlation takes at least 3")

    def run(self, events: Events) -> dict[str, Any]:
        """Seconds of each plan: predicted before and after its kernels were tuned, and measured."""
        from codegen.bench.cpu_build import tuned_build
        from codegen.bench.network import opened
        from codegen.library_timing import time_side_by_side
        from codegen.space import EFFORTS
        from codegen.target import parse_target
        from codegen.tune.options import TuningOptions
        from codegen.tune.statistics import summary
        from codegen.walks import plain_chain
        from passes.correct import Choice

        model = existing(self.models / MODEL, "--models", "ResNet-20 for CIFAR-10")
        rng = np.random.default_rng(self.seed)
        with TemporaryDirectory() as name:
            folder = Path(name)
            database = self.database or folder / "trials.jsonl"
            plain = parse_target("cpu")
            assert plain.tuned is not None
            target = plain.tuned(TuningOptions(database=database, effort=self.effort))
            try:
                network = opened(model, target)
                effort = EFFORTS["quick"]
                space = network.space(None, effort, effort.correction(self.seed), QuietEvents())
                prices: Any = target.latency
                files, before, after, macs = [], [], [], []
                with events.stage("tune the plans", self.plans) as progress:
                    for index in range(self.plans):
                        picks = {}
                        for site in space.sites:
                            found = space.scored[site.name].candidates
                            chosen = found[int(rng.integers(len(found)))]
                            picks[site.name] = Choice(chosen.format, chosen.rank)
                        path = folder / f"{index}.onnx"
                        chains = {
                            site.name: plain_chain(site, picks[site.name])
                            for site in space.sites
                            if picks[site.name].format is not None
                        }
                        before.append(network.written(chains, path).latency)
                        macs.append(space.price(picks).macs)
                        files.append(path)
                        progress.advance(1)
                    works = _stages(files)
                    prices.measure(works, events)
                    after = [_priced(prices, path) for path in files]
                    dense_price = _priced(prices, model)
                dense = folder / "dense.so"
                tuned_build(model, database, dense)
                measured, dense_s = [], []
                feeds = network.network.random_feeds(self.seed)
                with events.stage("time the plans", self.plans) as progress:
                    for path in files:
                        library = path.with_suffix(".so")
                        tuned_build(path, database, library)
                        samples = time_side_by_side({"dense": dense, "plan": library}, {}, feeds, 1)
                        measured.append(summary(samples["plan"].ravel().tolist()).seconds)
                        dense_s.append(summary(samples["dense"].ravel().tolist()).seconds)
                        library.unlink()
                        progress.advance(1)
            finally:
                target.close()
        # what the list does not see of the network as it came, a search adds to every plan
        unseen = float(np.median(dense_s)) - dense_price
        rows = [
            {"before": b + unseen, "after": a + unseen, "measured": m, "dense": d, "macs": c}
            for b, a, m, d, c in zip(before, after, measured, dense_s, macs, strict=True)
        ]
        return {
            "plans": rows,
            "before": _judged(rows, "before"),
            "after": _judged(rows, "after"),
            "kinds": {"before": "estimated", "after": "estimated", "measured": "measured"},
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        judged = tuple(
            (
                f"{what} the plans' kernels were tuned",
                f"{result[what]['rank_correlation']:.4f}",
                f"{result[what]['median_error']:.1%}",
                f"{result[what]['largest_error']:.1%}",
            )
            for what in ("before", "after")
        )
        plans = tuple(
            (
                str(index),
                f"{row['macs'] / 1e6:.2f}M",
                f"{1e6 * row['before']:,.1f}",
                f"{1e6 * row['after']:,.1f}",
                f"{1e6 * row['measured']:,.1f}",
                f"{1e6 * row['dense']:,.1f}",
            )
            for index, row in enumerate(result["plans"])
        )
        return [
            Table(
                f"{len(plans)} random plans of ResNet-20, predicted against measured",
                ("prediction", "rank correlation", "median error", "largest error"),
                judged,
            ),
            Table(
                "microseconds",
                ("plan", "MACs", "predicted before", "predicted after", "measured", "dense beside it"),
                plans,
            ),
        ]


def _judged(rows: list[dict[str, Any]], what: str) -> dict[str, float]:
    from scipy.stats import spearmanr

    predicted, measured = (np.array([row[key] for row in rows]) for key in (what, "measured"))
    errors = np.abs(predicted / measured - 1)
    return {
        "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "median_error": float(np.median(errors)),
        "largest_error": float(errors.max()),
    }


def _stages(files: list[Path]) -> list[Any]:
    from passes.onnx_graph import OnnxGraph

    found = (op.stage for path in files for op in OnnxGraph.read(path).workload())
    return list(dict.fromkeys(stage for stage in found if stage is not None))


def _priced(prices: Any, path: Path) -> float:
    from passes.onnx_graph import OnnxGraph

    return float(prices.network(OnnxGraph.read(path).workload()).latency)
