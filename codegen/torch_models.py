"""Torch networks through the one pipeline: exported to ONNX, lowered, and brought back into their own module."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from codegen import driver
from codegen.checkpoint import file_sha256
from codegen.config import LowerConfig
from codegen.events import Events
from codegen.plan_search import read_plan
from codegen.report.build import to_json
from codegen.report.html import to_html
from codegen.result import InspectRow, LowerResult
from codegen.workspace import can_resume, check_output
from passes import fx_rewritten
from passes.errors import RankcError, UnsupportedError, UsageError, VerificationError
from passes.fx_export import to_onnx
from passes.fx_graph import FxGraph
from passes.fx_plan import matched
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph

SOURCE = "source.onnx"
"""The network as it was exported."""
PROGRAM = "model.pt2"
"""The rewritten network as torch.export writes it."""


Keep = Callable[[Path, LowerConfig, dict[str, Any]], dict[str, Any]]
"""Puts what a caller handed over into the staging folder: takes that, the configuration as its config.toml says it, and
the report; returns the report as it stands then."""


@dataclass(frozen=True, eq=False)
class TorchResult:
    """What a run of a torch network hands back: the run's own result, and the rewritten module."""

    result: LowerResult
    module: fx.GraphModule


def inputs_folder(output: Path) -> Path:
    """Where a run keeps what it made of its inputs until it is done; beside the output, found again on resumption."""
    whole = output.absolute()
    return whole.with_name(f".{whole.name}.inputs")


def lower_pt2(config: LowerConfig, events: Events) -> TorchResult:
    """One run for a ``.pt2`` file; the output folder is as for ``.onnx``, and ``model.pt2`` lies in it."""
    return lower_graph(config, FxGraph.read(config.model, config.shapes), events)


def inspect_pt2(config: LowerConfig, events: Events, folder: Path) -> list[InspectRow]:
    """What a run would do to each layer of a ``.pt2`` file; ``folder`` takes the exported network."""
    graph = FxGraph.read(config.model, config.shapes)
    return driver.inspect(config.model_copy(update={"model": export(graph, folder / SOURCE)}), events)


def lower_graph(config: LowerConfig, graph: FxGraph, events: Events, keep: Keep | None = None) -> TorchResult:
    """One run for a torch network. ``config.model`` is its ``.pt2`` file, or a name for a module that has none.

    The output folder is whole or not there: a VerificationError of the way back into torch leaves nothing.
    """
    if config.output is None:
        raise UsageError("no output folder: give -o DIR")
    check_output(config.output, force=config.force, resume=config.resume)
    folder = inputs_folder(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _stage(events, "export to ONNX"):
            changes: dict[str, Any] = {"model": export(graph, folder / SOURCE)}
            if config.plan is not None:
                changes["plan"] = _own_plan(config.plan, OnnxGraph.read(changes["model"]), folder / "plan.json")
        run = config.model_copy(update=changes)
        modules: list[fx.GraphModule] = []

        def finish(staging: Path, report: dict[str, Any]) -> dict[str, Any]:
            with _stage(events, "bring back into torch"):
                modules.append(fx_rewritten.rewritten(graph, OnnxGraph.read(staging / "model.onnx")))
            program = save_program(modules[0], graph, staging / PROGRAM)
            if not program:
                events.note(f"no {PROGRAM}: torch.export cannot take the rewritten module")
            told, report = _published(config, run, staging, report, program)
            return report if keep is None else keep(staging, told, report)

        result = driver.lower(run, events, finish)
    except BaseException:
        if not can_resume(config.output):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return TorchResult(result, modules[0])


def _stage(events: Events, name: str) -> Any:
    return events.stage(name)


def export(graph: FxGraph, path: Path) -> Path:
    """Writes the network as ONNX, its batch symbolic where it takes batches of any size; returns ``path``."""
    names = [spec.name for spec in graph.inputs], [spec.name for spec in graph.outputs]
    feeds = graph.random_feeds(0)
    inputs = [torch.from_numpy(np.asarray(feeds[name])) for name in names[0]]
    takes_any = all(not isinstance(s.shape[0], int) or _is_traced(graph) for s in graph.inputs if s.shape)
    wider = [torch.cat([x, x[:1]]) if x.ndim else x for x in inputs]
    if takes_any and _runs(graph.module, wider):
        try:  # at a size of batch that no constant in the network happens to be
            model = to_onnx(graph.module, wider, *names, dynamic_batch=True)
            _at_another_batch(model, graph, inputs)
        except (UnsupportedError, VerificationError):
            model = to_onnx(graph.module, inputs, *names, dynamic_batch=False)
    else:
        model = to_onnx(graph.module, inputs, *names, dynamic_batch=False)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _is_traced(graph: FxGraph) -> bool:
    """True for a module that was traced: the sizes of its examples say nothing of which sizes it takes."""
    return all(all(isinstance(size, int) for size in spec.shape) for spec in graph.inputs)


def _runs(module: fx.GraphModule, inputs: list[torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception:  # whatever a module raises on a batch that it does not take
        return False
    return True


def _at_another_batch(model: Any, graph: FxGraph, inputs: list[torch.Tensor]) -> None:
    """Raises VerificationError where the exported network is bound to the batch that it was exported at."""
    network = OnnxGraph.from_model(model)
    feeds = {spec.name: x.numpy() for spec, x in zip(graph.inputs, inputs, strict=True)}
    try:
        found = network.run({name: feeds[name] for name in network.input_shapes})
    except RankcError as error:
        raise VerificationError(str(error)) from error
    for one, two in zip(found, graph.run(feeds), strict=True):
        if one.shape != two.shape or not np.allclose(one, two, rtol=1e-3, atol=1e-5):
            raise VerificationError("the exported network is bound to one size of batch")


def _own_plan(path: Path, network: OnnxGraph, to: Path) -> Path:
    """The plan with the layers' names of ``network``: it may have been made on another export of the same module."""
    wanted = read_plan(path)
    PassManager(driver.CANONICAL).run(network)
    sites = network.sites().sites
    names = matched(list(wanted), sites)
    plan = json.loads(path.read_text(encoding="utf-8"))
    for layer in plan["layers"]:
        layer["name"] = names[layer["name"]]
    to.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    return to


def save_program(module: fx.GraphModule, graph: FxGraph, path: Path) -> bool:
    """Writes the module as a ``.pt2`` file, its batch symbolic if it can be; False where torch cannot export it."""
    feeds = graph.random_feeds(0)
    inputs = tuple(torch.from_numpy(np.asarray(feeds[spec.name])) for spec in graph.inputs)
    wider = tuple(torch.cat([x, x]) if x.ndim else x for x in inputs)
    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch} if x.ndim else None for x in inputs)
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for given, shapes in ((wider, dynamic), (inputs, None)):
                try:
                    program = torch.export.export(module, given, dynamic_shapes=shapes)
                except Exception:  # torch.export lets through whatever it meets; the next form may do
                    continue
                torch.export.save(program, path)
                return True
    finally:
        log.setLevel(level)
    return False


def _published(
    config: LowerConfig, run: LowerConfig, staging: Path, report: Mapping[str, Any], program: bool
) -> tuple[LowerConfig, dict[str, Any]]:
    """Tells in the staging folder what the run was really given; returns config.toml and report as they are then.

    A module has no file: the exported network stays in the folder and is what the run can be repeated with.
    """
    assert config.output is not None
    out = config.output
    artifacts: dict[str, Any] = dict(report["artifacts"])
    if program:
        artifacts["torch"] = PROGRAM
    if config.model.exists():
        model, said = config.model, {"path": str(config.model), "sha256": file_sha256(config.model)}
    else:
        model = out / SOURCE
        shutil.copyfile(run.model, staging / SOURCE)
        artifacts["source"] = SOURCE
        said = {"path": str(config.model), "sha256": file_sha256(staging / SOURCE)}
    told = {**report, "model": said, "artifacts": artifacts}
    plan = config.plan if config.model.exists() or run.plan is None else out / "plan.json"
    repeats = config.model_copy(update={"model": model, "plan": plan})
    write_told(repeats, told, staging)
    return repeats, told


def write_told(config: LowerConfig, report: dict[str, Any], staging: Path) -> None:
    """Writes what a run says of itself anew; the paths in ``config`` are those after the commit."""
    assert config.output is not None
    (staging / "config.toml").write_text(config.to_toml(config.output), encoding="utf-8")
    (staging / "report.json").write_text(to_json(report), encoding="utf-8")
    (staging / "report.html").write_text(to_html(report), encoding="utf-8")
