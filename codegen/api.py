"""``lower`` for Python callers: the pipeline of the command line on a file, an ONNX model or a torch module.

    result = lower(model, "asic", example_inputs=images[:1], latency="60%", calib=images)
    result.model(images), result.plan, result.report

Every option means what it means on the command line, and every path goes through :func:`codegen.driver.lower`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import fx, nn

from codegen import driver
from codegen.api_data import Data, source_of
from codegen.config import SOURCES, LowerConfig
from codegen.events import Events, QuietEvents
from codegen.result import LowerResult
from codegen.torch_models import SOURCE, lower_graph, write_told
from codegen.workspace import check_output
from passes.core.cost import METRICS
from passes.errors import InputError, UsageError
from passes.fx_graph import FxGraph
from passes.graph import TensorSpec
from passes.onnx_graph import OnnxGraph

__all__ = ["Lowered", "lower"]

Network = str | Path | onnx.ModelProto | OnnxGraph | nn.Module
"""A path of an ``.onnx`` or ``.pt2`` file, an ONNX model, or a torch module."""

_CONSOLE = ("dry_run", "explain")
"""Options that only say something on a console."""


@dataclass(frozen=True, eq=False)
class Lowered:
    """What came out.

    ``model``: for ONNX, the rewritten network, which ``save`` writes and ``run`` runs; for torch, the rewritten module
    in inference mode on the CPU, with the inputs and outputs it had. ``plan`` and ``report`` are plan.json and
    report.json. ``folder`` holds all files of the run, the binary among them; None where no ``output`` was given.
    ``missed``: a budget or the error limit is not met.
    """

    model: OnnxGraph | fx.GraphModule
    plan: dict[str, Any]
    report: dict[str, Any]
    folder: Path | None
    missed: bool


def lower(
    model: Network,
    target: str = "asic",
    *,
    example_inputs: Any = None,
    latency: str | None = None,
    energy: str | None = None,
    macs: str | None = None,
    params: str | None = None,
    size: str | None = None,
    calib: Data = None,
    train: Data = None,
    eval: Data = None,  # the name of the command line's option
    output: str | Path | None = None,
    plan: str | Path | Mapping[str, Any] | None = None,
    events: Events | None = None,
    **options: Any,
) -> Lowered:
    """Lowers a network and returns it, with plan and report; the input stays as it is.

    ``example_inputs`` are for a module: a tensor, tensors in order, or by name of forward's parameters. Their spatial
    sizes are what the network is priced at, at one sample a time unless ``shapes`` says otherwise. Budgets are written
    as on the command line ("60%", "2.5ms"). ``calib``, ``train`` and ``eval`` are sources as on the command line, or
    data, see :data:`codegen.api_data.Data`: an iterable is read to its end, once. ``plan`` replays a plan of this
    network, or of another export of it. Other ``options`` are those of the command line, with underscores.

    What was handed over in memory, data, an ONNX model or a plan, lies in the output's ``data`` folder afterwards: the
    run can be repeated from its config.toml, and an interrupted one be resumed with the same call.

    Without ``output`` the run works in a temporary folder: no file stays, and model, plan and report are complete
    without. Raises RankcError for everything that a caller can mend; a missed budget is no error but a warning.
    """
    for name in _CONSOLE:
        if options.pop(name, None):
            raise UsageError(f"{name} is for the command line")
    budgets = {
        metric: text
        for metric, text in zip(METRICS, (latency, energy, macs, params, size), strict=True)
        if text is not None
    }
    given = {"calib": calib, "train": train, "eval": eval}
    with tempfile.TemporaryDirectory(prefix="rankc-") as scratch:
        out = Path(scratch) / "out" if output is None else Path(os.path.abspath(Path(output).expanduser()))
        check_output(out, force=bool(options.get("force")), resume=bool(options.get("resume")))
        values: dict[str, Any] = {"target": target, "budgets": budgets, "output": out, **options}
        # Beside the output: an interrupted run is known by the paths it was given, which must be the same next time.
        data = out.with_name(f".{out.name}.data")
        shutil.rmtree(data, ignore_errors=True)  # of a run that was killed
        try:
            source = _source(model, example_inputs, options.get("shapes") or {}, data)
            values |= _data(given, source.inputs, data)
            if plan is not None:
                values["plan"] = _plan(plan, data)
            result, rewritten = _run(source, values, data, events or QuietEvents())
            if isinstance(rewritten, OnnxGraph) and rewritten.data_files and output is None:
                raise UsageError("the network is too large to be handed over without a file: give output=FOLDER")
        finally:
            shutil.rmtree(data, ignore_errors=True)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        done = Lowered(
            rewritten,
            json.loads((out / "plan.json").read_text(encoding="utf-8")),
            report,
            None if output is None else out,
            result.missed,
        )
    if done.missed:
        missed = ", ".join(b["metric"] for b in report["budgets"] if not b["met"]) or "the error limit"
        warnings.warn(f"missed: {missed}; the report has what was reached and what is possible", stacklevel=2)
    return done


@dataclass(frozen=True, eq=False)
class _Source:
    """A network as the pipeline takes it: a file, and for torch the graph that the file is exported from."""

    path: Path
    inputs: tuple[TensorSpec, ...]
    graph: FxGraph | None = None


def _source(model: Network, examples: Any, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> _Source:
    if isinstance(model, nn.Module):
        if examples is None:
            raise UsageError("example_inputs are missing: a torch module does not say the shapes of its inputs")
        graph = FxGraph.trace(model, examples)
        return _Source(Path(f"{type(model).__name__}.module"), graph.inputs, graph)
    if examples is not None:
        raise UsageError("example_inputs are for torch modules; the shapes of a file's inputs are given by shapes=")
    if isinstance(model, str | Path):
        path = Path(model).expanduser().absolute()
        if path.suffix == ".pt2":
            graph = FxGraph.read(path, shapes)
            return _Source(path, graph.inputs, graph)
        read = OnnxGraph.read(path, shapes)
    elif isinstance(model, onnx.ModelProto | OnnxGraph):
        read = model if isinstance(model, OnnxGraph) else OnnxGraph.from_model(model, shapes)
        path = _made(folder) / SOURCE
        read.save(path)
    else:
        raise InputError(f"a network cannot be a {type(model).__name__}: give a path, an ONNX model or a torch module")
    return _Source(path, read.inputs)


def _data(given: Mapping[str, Data], specs: Sequence[TensorSpec], folder: Path) -> dict[str, str]:
    found = {}
    for option, data in given.items():
        if data is not None:
            path = folder if isinstance(data, str | Path) else _made(folder)
            found[option] = source_of(data, [spec.name for spec in specs], option, path)
    return found


def _plan(plan: str | Path | Mapping[str, Any], folder: Path) -> Path:
    if not isinstance(plan, Mapping):
        return Path(plan).expanduser().absolute()
    try:
        text = json.dumps(dict(plan), indent=2)
    except (TypeError, ValueError) as error:
        raise InputError(f"plan: is no JSON: {error}") from error
    path = _made(folder) / "plan_given.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def _run(
    source: _Source, values: dict[str, Any], data: Path, events: Events
) -> tuple[LowerResult, OnnxGraph | fx.GraphModule]:
    config = LowerConfig.from_values({"model": source.path, **values}).resolved(Path.cwd())
    if source.graph is not None:

        def keep(staging: Path, told: LowerConfig, report: dict[str, Any]) -> dict[str, Any]:
            return _keep(data, staging, told, report)

        done = lower_graph(config.model_copy(update={"model": source.path}), source.graph, events, keep)
        return done.result, done.module
    result = driver.lower(config, events, lambda staging, report: _keep(data, staging, config, report))
    assert result.output is not None
    return result, OnnxGraph.read(result.output / "model.onnx", config.shapes)


def _keep(data: Path, staging: Path, config: LowerConfig, report: dict[str, Any]) -> dict[str, Any]:
    """Moves what was handed over into the staging folder, and says so there; returns the report as it is then."""
    if not data.exists():
        return report
    assert config.output is not None
    shutil.move(data, staging / "data")
    kept = config.output / "data"
    moved: dict[str, Any] = {
        name: str(kept / Path(source).name)
        for name in SOURCES
        if (source := getattr(config, name)) is not None and Path(source).parent == data
    }
    moved |= {
        name: kept / path.name
        for name in ("model", "plan")
        if (path := getattr(config, name)) is not None and path.parent == data
    }
    said = {**report, "artifacts": {**report["artifacts"], "data": "data"}}
    if "model" in moved:
        said["model"] = {**report["model"], "path": str(moved["model"])}
    write_told(config.model_copy(update=moved), said, staging)
    return said
