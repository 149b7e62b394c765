"""Runs an experiment: every step of every seed, then each network on the test set, then the result.

In ``output``/NAME/SCHEDULE: ``result.json`` (see result.schema.json), ``curves.csv`` and ``log.txt``; beside them a
folder per seed with the steps. The same call goes on where an earlier one was interrupted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import onnx

from codegen.bench.cifar10 import top1
from codegen.events import Events, Progress
from codegen.report.build import tool_versions
from codegen.reproduce.data import SOURCES, Data
from codegen.reproduce.experiment import DENSE, Experiment, ScheduleName, experiment
from codegen.reproduce.steps import Done, Settings, carry_out, digest, folder_of, resolved, write
from codegen.tvm_network_onnx import free_inputs
from passes.errors import InputError, UsageError

SCHEMA = 1
COLUMNS = ("seed", "step", "phase", "epoch", "loss", "lr", "held_out", "seconds")


@dataclass(frozen=True)
class ReproduceConfig:
    """``seeds``: None for the schedule's own. ``epochs`` replaces every step's. ``dense``: one that is not trained."""

    name: str
    output: Path
    data: Path
    models: Path
    schedule: ScheduleName = "short"
    seeds: tuple[int, ...] | None = None
    epochs: int | None = None
    dense: Path | None = None
    device: str = "auto"


def reproduce(config: ReproduceConfig, events: Events) -> dict[str, Any]:
    """The result, as it was written. RankcError where a step cannot be done; KeyboardInterrupt after Ctrl-C."""
    plan = experiment(config.name, config.schedule)
    if config.seeds is not None:
        if not config.seeds or len(set(config.seeds)) != len(config.seeds) or min(config.seeds) < 0:
            raise UsageError(f"--seeds {','.join(map(str, config.seeds))}: write different numbers, such as 0,1,2")
        plan = replace(plan, seeds=config.seeds)
    output = Path(os.path.abspath(config.output))  # a run is the same run however -o is written
    data = SOURCES[plan.data](Path(os.path.abspath(config.data)))
    settings = Settings(output, data, config.models, config.dense, config.epochs, config.device)
    data_sha256 = data.sha256()
    folder = folder_of(plan, replace(plan.steps[-1], owner=plan.name), 0, settings).parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _bind_data(output / "data.json", {plan.data: data_sha256})
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    with (folder / "log.txt").open("a", encoding="utf-8") as file:
        log = LoggedEvents(events, file)
        log.line(f"{plan.name}, schedule {plan.schedule}, seeds {', '.join(map(str, plan.seeds))}")
        done: dict[int, dict[str, Done]] = {}
        with log.stage(plan.title, len(plan.seeds) * len(plan.steps)) as progress:
            for seed in plan.seeds:
                done[seed] = {}
                for step in plan.steps:
                    with log.stage(f"seed {seed}, {step.name}"):
                        done[seed][step.name] = carry_out(plan, step, seed, done[seed], settings, log)
                    progress.advance(1, f"seed {seed}, {step.name} is done")
                    write_curves(folder / "curves.csv", done)
        with log.stage("evaluate on the test set", len(plan.seeds) * len(plan.steps)) as progress:
            accuracies = evaluate(folder / "evaluation.json", data, data_sha256, done, progress)
        result = build(plan, settings, data_sha256, done, accuracies)
        for row in result["summary"]:
            log.line(f"{row['step']}: top-1 {100 * row['accuracy_mean']:.2f} %")
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write(folder / "result.json", text)
    return result


def evaluate(
    path: Path, data: Data, data_sha256: str, done: Mapping[int, Mapping[str, Done]], progress: Progress
) -> dict[str, float]:
    """Top-1 on the test set of every network, int8 ones too, by digest. One that ``path`` has is not run again."""
    known: dict[str, float] = {}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        known = found["top1"] if found["data"] == data_sha256 else {}
    test = None
    needed: dict[str, float] = {}
    for steps in done.values():
        for name, one in steps.items():
            for model in (one.model, one.quantized):
                if model is None:
                    continue
                int8 = model == one.quantized
                key = digest(model)
                kept = f"{key}, exact" if int8 else key  # int8 ones were run by whatever kernels there were once
                if kept not in known:
                    test = data.test() if test is None else test
                    known[kept] = top1(model, *test, batch=batch_of(model), int8=int8)
                    write(path, json.dumps({"data": data_sha256, "top1": known}, indent=2) + "\n")
                needed[key] = known[kept]
            progress.advance(1, name)
    return needed


def batch_of(model: Path) -> int:
    """How many samples a network is run on at once: what its file says, 250 where it takes any number."""
    data = free_inputs(onnx.load(model, load_external_data=False))[0]
    return data.type.tensor_type.shape.dim[0].dim_value or 250  # 0 where it has a name


def build(
    plan: Experiment,
    settings: Settings,
    data_sha256: str,
    done: Mapping[int, Mapping[str, Done]],
    accuracies: Mapping[str, float],
) -> dict[str, Any]:
    """The result as ``result.schema.json`` has it. ``gain_points``: over the dense network of the same seed."""
    runs = []
    for seed, steps in done.items():
        dense = accuracies[digest(steps[DENSE].model)]
        for step, one in steps.items():
            accuracy = accuracies[digest(one.model)]
            runs.append(
                {
                    "seed": seed,
                    "step": step,
                    "model_sha256": digest(one.model),
                    "accuracy": accuracy,
                    "gain_points": 100 * (accuracy - dense),
                    "accuracy_int8": None if one.quantized is None else accuracies[digest(one.quantized)],
                    **one.figures,
                }
            )
    result = {
        "schema": SCHEMA,
        "experiment": plan.name,
        "title": plan.title,
        "schedule": plan.schedule,
        "epochs": settings.epochs,
        "seeds": list(plan.seeds),
        "data": {"name": plan.data, "sha256": data_sha256},
        "recipes": {step.name: {"kind": step.kind, **resolved(step, settings)} for step in plan.steps},
        "dense_given": settings.dense is not None,
        "machine": _machine(settings.device),
        "tool": tool_versions(),
        "runs": runs,
        "summary": [_summary(step.name, [run for run in runs if run["step"] == step.name]) for step in plan.steps],
        "published": [row.model_dump(exclude_none=True) for row in plan.published],
    }
    jsonschema.validate(result, schema())
    return result


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a result."""
    found: dict[str, Any] = json.loads((resources.files(__package__) / "result.schema.json").read_text("utf-8"))
    return found


def _summary(step: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def both(key: str) -> tuple[float, float | None]:
        values = [float(run[key]) for run in runs]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    accuracy, accuracy_deviation = both("accuracy")
    gain, gain_deviation = both("gain_points")
    # a mean over some of the seeds would stand beside one over all of them
    every = all(run["accuracy_int8"] is not None for run in runs)
    int8, int8_deviation = both("accuracy_int8") if every else (None, None)
    judged = [run["budgets_met"] for run in runs if "budgets_met" in run]
    row = {
        "step": step,
        "runs": len(runs),
        "accuracy_mean": accuracy,
        "accuracy_deviation": accuracy_deviation,
        "gain_points_mean": gain,
        "gain_points_deviation": gain_deviation,
        "accuracy_int8_mean": int8,
        "accuracy_int8_deviation": int8_deviation,
        "budgets_missed": judged.count(False) if judged else None,
    }
    for name in ("macs", "params", "latency"):
        pairs = [run[name] for run in runs if name in run]
        row[f"{name}_ratio_mean"] = statistics.fmean(after / before for before, after in pairs) if pairs else None
    return row


def _machine(device: str) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cores": cores, "threads": torch.get_num_threads(), "processor": platform.machine(),
        "system": platform.system(), "gpu": gpu,
    }  # fmt: skip


def write_curves(path: Path, done: Mapping[int, Mapping[str, Done]]) -> None:
    """Learning curves of all steps, an epoch a row."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for seed, steps in done.items():
        for name, one in steps.items():
            writer.writerows({"seed": seed, "step": name, **row} for row in one.curve)
    write(path, table.getvalue())


def _bind_data(path: Path, given: Mapping[str, str]) -> None:
    """Steps of one folder are all of the same data. UsageError where they would not be."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, sha256 in given.items():
        if before.get(name, sha256) != sha256:
            raise UsageError(f"{path.parent}: its experiments saw other {name} data; give another -o")
    if {**before, **given} != before:
        write(path, json.dumps({**before, **given}, indent=2) + "\n")


class LoggedEvents:
    """Passes everything on to ``inner`` and keeps stages, notes and warnings in a file, with the time."""

    def __init__(self, inner: Events, file: Any) -> None:
        self.inner, self.file, self._depth = inner, file, 0

    def line(self, text: str) -> None:
        self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {'  ' * self._depth}{text}\n")
        self.file.flush()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Progress]:
        began = time.monotonic()
        self.line(name)
        self._depth += 1
        try:
            with self.inner.stage(name, total) as progress:
                yield progress
        except BaseException as error:
            self.line(f"stopped by {type(error).__name__}")
            raise
        finally:
            self._depth -= 1
        self.line(f"{name}: {time.monotonic() - began:.1f} s")

    def note(self, text: str) -> None:
        self.line(f"note: {text}")
        self.inner.note(text)

    def warning(self, text: str) -> None:
        self.line(f"warning: {text}")
        self.inner.warning(text)
