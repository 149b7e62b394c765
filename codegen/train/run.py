"""One training run from options to files: data, network, layers, phases, export, verification, report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from codegen.events import Events, QuietEvents, RecordingEvents
from codegen.report.build import tool_versions
from codegen.train import export, network
from codegen.train.config import TrainConfig
from codegen.train.methods import METHODS, Phase, Work
from codegen.train.output import CONFIG, LOG, MODEL, WEIGHTS, Output
from codegen.train.report import SCHEMA_VERSION, checked, hardware, layer_rows, phase_row, to_json
from codegen.training_data import augmentation, load_training
from passes.core.site import Chain
from passes.errors import InputError
from passes.training import checkpoint
from passes.training.data import TrainingSet
from passes.training.devices import Group, joined
from passes.training.factored import ordinary, scan, selected
from passes.training.layers import ChainLayer, StageLayer
from passes.training.progress import Epoch, Run, Step
from passes.training.trainer import Trainer

OnEpoch = Callable[[str, Epoch, int], None]
"""Told the phase, the epoch, and how many epochs the phase has."""


def train(config: TrainConfig, events: Events, on_epoch: OnEpoch = lambda *_: None) -> dict[str, Any] | None:
    """Carries out what ``config`` asks for; the report as ``schema.json`` describes it.

    In a run of several processes (torchrun) all but the leading one write nothing, say nothing and return None.
    Raises RankcError where the run cannot be done, KeyboardInterrupt after Ctrl-C with the checkpoint written.
    """
    with joined(config.device) as group, ExitStack() as stack:
        if not group.leads:
            # the leader's folder is in order before anybody works, and nobody starts where the run is through
            if not int(group.from_leader(torch.zeros(1, dtype=torch.int64, device=group.device))):
                _Training(config, QuietEvents(), group).run()
            return None
        output = Output(config.output)
        done = stack.enter_context(output.opened(config.recipe(), force=config.force, resume=config.resume))
        group.from_leader(torch.tensor([int(done is not None)], device=group.device))
        if done is not None:
            events.note(f"{config.output}: the run is through already")
            return done
        return _Training(config, events, group, output, on_epoch).run()


class _Training:
    def __init__(
        self,
        config: TrainConfig,
        events: Events,
        group: Group,
        output: Output | None = None,
        on_epoch: OnEpoch = lambda *_: None,
    ) -> None:
        self.config, self.group, self.output, self.on_epoch = config, group, output, on_epoch
        self.events = RecordingEvents(events)

    def run(self) -> dict[str, Any] | None:
        config, events = self.config, self.events
        with events.stage("prepare the network"):
            source = network.load(config.network, config.train, config.inputs, config.outputs, config.options.seed)
            layers = scan(source.module, source.example(), source.called())
            sites, notes = selected(layers, config.include, config.exclude) if config.method != "dense" else ((), [])
            params = _params(source.module)
        data = load_training(config.train, source.inputs, events)
        if data.labels is None:
            raise InputError(f"{config.train}: has no 'labels'; training from scratch needs the class of each sample")
        evaluation = None if config.eval is None else load_training(config.eval, source.inputs, events)
        if evaluation is not None and evaluation.labels is None:
            raise InputError(f"{config.eval}: has no 'labels'")
        work = Work(config, source, layers, sites, data, notes, events.warning)
        phases = METHODS[config.method]().phases(work)
        rows: list[dict[str, Any]] = []
        epochs: list[tuple[str, Epoch]] = []
        for phase in phases:
            facts = phase.enter()
            rows.append(phase_row(phase.name, phase.options.as_dict(), facts, self._phase(phase, work, epochs)))
        if self.output is None:
            return None
        with events.stage("write and verify"):
            return self._finish(self.output, work, rows, evaluation, params)

    def _phase(self, phase: Phase, work: Work, epochs: list[tuple[str, Epoch]]) -> Run:
        """Trains, telling of every step and epoch, and keeps log.csv."""
        config, output = self.config, self.output
        augment = augmentation(config.train, phase.options.augment)
        folder = config.output / "checkpoint" / phase.name
        total, held = phase.options.epochs, ""
        rest = len(work.data) - round(phase.options.held_out * len(work.data))
        steps = total * max(rest // phase.options.batch, 1)
        before = [(name, epoch) for name, epoch in epochs]
        if output is not None:
            output.set_aside()
            found = checkpoint.load(folder / "training.pt")
            for row in () if found is None else found["epochs"]:
                epochs.append((phase.name, Epoch(**row)))
        with self.events.stage(phase.name, steps) as progress:
            done = 0

            def step(now: Step) -> None:
                nonlocal done
                if output is not None:
                    output.begin()  # the Trainer tells of a step before it writes the checkpoint after it
                progress.advance(now.number - done, f"epoch {now.epoch + 1}/{total}, loss {now.loss:.3f}{held}")
                done = now.number

            def finished(epoch: Epoch) -> None:
                nonlocal held
                held = "" if epoch.held_out is None else f", held out {100 * epoch.held_out:.2f} %"
                epochs.append((phase.name, epoch))
                if output is not None:
                    output.log(epochs)
                self.on_epoch(phase.name, epoch, total)

            run = Trainer(
                work.module,
                phase.objective,
                work.data,
                phase.options,
                folder=folder,
                group=self.group,
                augment=augment,
                on_step=step,
                on_epoch=finished,
                on_note=self.events.note,
            ).run()
        epochs[:] = [*before, *((phase.name, epoch) for epoch in run.epochs)]
        if output is not None:
            output.log(epochs)
        return run

    def _finish(
        self,
        output: Output,
        work: Work,
        rows: list[dict[str, Any]],
        evaluation: TrainingSet | None,
        params: int,
    ) -> dict[str, Any]:
        config, source = self.config, work.source
        module = work.module.cpu().eval()
        chains = _chains(work)
        written = layer_rows(work.layers, chains, [*work.notes, *work.layers.kept])
        spared = sum(row["macs_before"] - row["macs_after"] for row in written if row["macs_before"] is not None)
        plain = ordinary(module)
        after = {"macs": work.layers.macs - spared, "params": _params(plain)}
        with output.placed(MODEL) as path:
            model = export.to_onnx(module, source)
            facts = {"rankc.recipe": config.recipe(), "rankc.held_out": rows[-1]["held_out"]}
            path.write_bytes(export.with_metadata(model, facts).SerializeToString())
            verification = export.verify(path, module, evaluation or work.data)
            accuracy = None if evaluation is None else export.top1(path, evaluation)
            facts["rankc.accuracy"] = accuracy
            path.write_bytes(export.with_metadata(model, facts).SerializeToString())
        with output.placed(WEIGHTS) as path:
            torch.save(plain.state_dict(), path)
        sets = {"train": (config.train, work.data), "eval": (config.eval, evaluation)}
        report = checked(
            {
                "schema": SCHEMA_VERSION,
                "tool": tool_versions(),
                "recipe": config.recipe(),
                "data": {
                    name: {"source": text, "samples": len(data), "sha256": data.digest()}
                    for name, (text, data) in sets.items()
                    if data is not None
                },
                "hardware": hardware(self.group),
                "phases": rows,
                "layers": written,
                "baseline": {"macs": work.layers.macs, "params": params, "accuracy": None},
                "result": {**after, "accuracy": accuracy},
                "verification": verification,
                "artifacts": {"onnx": MODEL, "weights": WEIGHTS, "log": LOG, "config": CONFIG},
                "timings": dict(self.events.timings),
                "warnings": list(self.events.warnings),
            }
        )
        output.finish(to_json(report))
        return report


def _chains(work: Work) -> dict[str, Chain]:
    """What stands in the sites' places now."""
    found = {}
    for site in work.layers.sites:
        layer = work.module.get_submodule(work.layers.paths[site.name])
        if isinstance(layer, ChainLayer):
            found[site.name] = layer.chain()
        elif isinstance(layer, StageLayer):
            found[site.name] = Chain((layer.stage(),))
    return found


def _params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
