"""The steps of an experiment, carried out by what ``rankc lower`` and ``rankc train`` call; each one once.

A step's folder holds ``step.json``, which says what it is, and ``result``, the folder that the command wrote. A step
whose result is whole is read and not repeated, wherever the folder lies by now; one that was interrupted goes on.
``machine.json`` says what it was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from codegen.checkpoint import file_sha256
from codegen.config import LowerConfig
from codegen.driver import lower
from codegen.events import Events
from codegen.reproduce import tiny
from codegen.reproduce.data import Data, loader
from codegen.reproduce.experiment import DENSE, Experiment, Step
from codegen.train.config import TrainConfig
from codegen.train.output import REPORT
from codegen.train.report import hardware
from codegen.train.run import train
from codegen.workspace import can_resume
from passes.errors import InputError, UsageError, first_line
from passes.files import write_text
from passes.onnx_graph import OnnxGraph
from passes.training.devices import ALONE, multiplies_bf16
from passes.training.options import TrainingOptions
from passes.training.svd_training import SvdOptions

RESULT, STEP, MACHINE = "result", "step.json", "machine.json"
INPUT = "input"
"""What the input of a network is called that is trained here."""


@dataclass(frozen=True)
class Settings:
    """What the user gave. ``dense``: a network that stands in for the dense ones, which are not trained then."""

    output: Path
    data: Data
    models: Path
    dense: Path | None = None
    epochs: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Done:
    """A step that was carried out. ``model``: its network. ``curve``: a row of each epoch. ``quantized``: the network
    of its int8 program, where it has one.

    ``figures`` are those of its report: MACs and parameters, the latency where a target was asked, what recovery
    started from and came to on held-out samples, seconds, and the device, precision and processor of training.
    """

    step: Step
    model: Path
    figures: dict[str, Any]
    curve: tuple[dict[str, Any], ...]
    quantized: Path | None = None


def resolved(step: Step, settings: Settings) -> dict[str, Any]:
    """The options of a step with what the user said about epochs."""
    options = dict(step.options)
    if settings.epochs is not None and step.kind != "given" and step.recover:
        options["epochs"] = settings.epochs
        if "warmup" in options:
            options["warmup"] = min(float(options["warmup"]), settings.epochs / 4)
        if "finetune_epochs" in options:
            options["finetune_epochs"] = settings.epochs
    return options


def folder_of(experiment: Experiment, step: Step, seed: int, settings: Settings) -> Path:
    """Where a step's files are: with the experiment whose recipe it is, so that those who share it find it."""
    length = experiment.schedule if settings.epochs is None else f"{experiment.schedule}-{settings.epochs}-epochs"
    return settings.output / step.owner / length / f"seed{seed}" / step.name


def carry_out(
    experiment: Experiment, step: Step, seed: int, before: Mapping[str, Done], settings: Settings, events: Events
) -> Done:
    """Does the step, or reads what it came to. ``before``: the steps of this seed that are done.

    UsageError where its folder holds a step of another recipe; what the command raises.
    """
    if step.name == DENSE and settings.dense is not None:
        return Done(step, _existing(settings.dense, "--dense"), {}, ())
    if step.kind == "given":
        assert step.file is not None
        return Done(step, _existing(settings.models / step.file, "--models"), {}, ())
    folder = folder_of(experiment, step, seed, settings)
    result = folder / RESULT
    options = resolved(step, settings)
    model = before[step.of].model if step.kind == "lower" else None
    ranks = None if step.ranks_of is None else before[step.ranks_of].model.with_name("plan.json")
    _bind(folder, {
        "kind": step.kind, "network": experiment.network, "seed": seed, "options": options,
        "model": None if model is None else file_sha256(model),
        **({} if ranks is None else {"ranks": file_sha256(ranks)}),
    })  # fmt: skip
    if model is not None:
        report = _finished(result / "report.json")  # results of lower are whole or not there
        if report is None:
            report = lower(lower_config(step, options, seed, model, result, settings), events).report
            if report["recovery"] is not None:
                _note_machine(folder, report["recovery"]["device"], report["recovery"]["precision"])
        artifacts = report["artifacts"]
        quantized = None if artifacts.get("quantized") is None else result / artifacts["quantized"]
        figures = _lower_figures(report, _noted_machine(folder))
        return Done(step, result / artifacts["onnx"], figures, _lower_curve(report), quantized)
    trained = _finished(result / REPORT)  # which train writes last
    if trained is None:
        given = options if ranks is None else {**options, "ranks": ranks}
        config = train_config(experiment, step, given, seed, result, settings)
        trained = train(config, events, lambda phase, epoch, total: events.note(_line(phase, epoch, total)))
        if trained is None:
            raise UsageError("start the experiments without torchrun; rankc train works with it")
        _note_machine(folder, trained["hardware"]["device"], trained["phases"][0]["options"]["precision"])
    figures = _train_figures(trained, _noted_machine(folder))
    return Done(step, result / trained["artifacts"]["onnx"], figures, _train_curve(trained))


def train_config(
    experiment: Experiment, step: Step, options: Mapping[str, Any], seed: int, output: Path, settings: Settings
) -> TrainConfig:
    """The run of ``rankc train`` that the step is. InputError for options that it does not have."""
    recipe = TrainingOptions.names()
    svd = options.get("svd", {})
    own = {name: value for name, value in options.items() if name not in recipe and name != "svd"}
    network = f"{tiny.__file__}:tiny" if experiment.network == "tiny" else experiment.network
    known = {field.name for field in fields(TrainConfig)} - {"options", "svd"}
    _check(step, own, known)
    _check(step, svd, {field.name for field in fields(SvdOptions)})
    try:
        training = TrainingOptions(**{k: v for k, v in options.items() if k in recipe}, seed=seed)
        return TrainConfig(
            method=step.kind,
            network=network,
            train=loader(settings.data, INPUT, settings.output / "data"),
            output=output,
            options=training,
            svd=SvdOptions(**svd),
            device=settings.device,
            resume=True,
            **own,
        )
    except ValueError as error:
        raise InputError(f"experiment {step.owner}, step {step.name}: {error}") from error


def lower_config(
    step: Step, options: Mapping[str, Any], seed: int, model: Path, output: Path, settings: Settings
) -> LowerConfig:
    """The run of ``rankc lower`` that the step is. InputError for options that it does not have."""
    _check(step, options, set(LowerConfig.model_fields))
    inputs = OnnxGraph.read(model).inputs
    if len(inputs) != 1:
        raise InputError(f"{model}: has {len(inputs)} inputs, the data are for one")
    source = loader(settings.data, inputs[0].name, settings.output / "data")
    values = {**options, "model": model, "seed": seed, "output": output}
    values |= {"train": source, "device": settings.device} if step.recover else {"calib": source}
    if can_resume(output):
        values["resume"] = True
    return LowerConfig.from_values(values, f"experiment {step.owner}, step {step.name}")


def write(path: Path, text: str) -> None:
    """Writes a file, whole or not at all. InputError where it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _finished(path: Path) -> dict[str, Any] | None:
    """The report of a command that is through; None where it is not. InputError for a file that is no report."""
    if not path.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    return report


def _note_machine(folder: Path, device: str, precision: str) -> None:
    """Keeps what the step was trained on just now: reports name neither all of it nor what "auto" came to."""
    place = torch.device(device)
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(place) else "fp32"
    processor = hardware(replace(ALONE, device=place))["processor"]
    text = json.dumps({"device": device, "precision": precision, "processor": processor}, indent=2) + "\n"
    write(folder / MACHINE, text)


def _noted_machine(folder: Path) -> dict[str, Any]:
    return _finished(folder / MACHINE) or {}


def _bind(folder: Path, what: dict[str, Any]) -> None:
    """Says what the folder is for. UsageError where it is for something else."""
    path = folder / STEP
    text = json.dumps(what, indent=2, sort_keys=True) + "\n"
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    if before != json.loads(text):
        names = ", ".join(sorted(k for k in {**before, **what} if before.get(k) != json.loads(text).get(k)))
        raise UsageError(f"{folder}: holds a step with another {names}; give another -o, or remove that folder")


def _check(step: Step, options: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"experiment {step.owner}, step {step.name}: there is no option {unknown[0]!r}")


def _existing(path: Path, option: str) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such network; {option} says where it is")
    return path


def _line(phase: str, epoch: Any, total: int) -> str:
    held = "" if epoch.held_out is None else f", held out {100 * epoch.held_out:.2f} %"
    return f"{phase}: epoch {epoch.number + 1} of {total}, loss {epoch.loss:.4f}{held}, {epoch.seconds:.0f} s"


def _lower_figures(report: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    before, after, recovery = report["baseline"], report["result"], report["recovery"]
    told = {} if recovery is None else {key: recovery[key] for key in ("device", "precision")}
    return {
        "macs": [before["macs"]["value"], after["macs"]["value"]],
        "params": [before["params"]["value"], after["params"]["value"]],
        "latency": [before["latency"]["value"], after["latency"]["value"]],
        "latency_unit": after["latency"]["unit"],
        "budgets_met": all(budget["met"] for budget in report["budgets"]),
        "held_out": None if recovery is None else [recovery["before"], recovery["after"]],
        "seconds": sum(report["timings"].values()) if recovery is None else recovery["seconds"],
        "trained_on": None if recovery is None else {"processor": None, **told, **machine},
    }


def _lower_curve(report: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    recovery = report["recovery"]
    return () if recovery is None else tuple({"phase": "recover", **row} for row in recovery["curve"])


def _train_figures(report: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    before, after = report["baseline"], report["result"]
    told = {key: report["hardware"][key] for key in ("device", "processor")}
    return {
        "macs": [before["macs"], after["macs"]],
        "params": [before["params"], after["params"]],
        "held_out": [None, report["phases"][-1]["held_out"]],
        "seconds": sum(phase["seconds"] for phase in report["phases"]),
        "trained_on": {"precision": report["phases"][0]["options"]["precision"], **told, **machine},
    }


def _train_curve(report: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"phase": phase["name"], "epoch": row["number"], **{k: row[k] for k in ("loss", "lr", "held_out", "seconds")}}
        for phase in report["phases"]
        for row in phase["epochs"]
    )


def digest(path: Path) -> str:
    """SHA-256 of a network's file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
