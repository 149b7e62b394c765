"""The stage "recover" of the pipeline: the rewritten network is trained against the dense one, on --train data.

It comes when the plan is settled. Weights do not change what a plan costs, so the files are emitted once more at the
end, and the budgets are judged on those.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from codegen.checkpoint import file_sha256
from codegen.config import LowerConfig
from codegen.dataset import Dataset, of_arrays, split_source
from codegen.events import Progress, RecordingEvents
from codegen.report.numbers import duration
from codegen.report.recovery import EpochRow, RecoveryReport, score
from codegen.space import cores
from codegen.training_data import ScriptAugmentation, augmentation, load_training
from passes.errors import InputError, UnsupportedError, UsageError
from passes.graph import TensorSpec
from passes.onnx_graph import OnnxGraph

if TYPE_CHECKING:  # torch is loaded by those who train
    from passes.training.augment import Augmentation
    from passes.training.data import TrainingSet
    from passes.training.devices import Group
    from passes.training.network import TrainableNetwork
    from passes.training.progress import Epoch, Step
    from passes.training.recovery import Recovered, RecoveryOptions

_EPOCHS = {"quick": 5, "default": 20, "extensive": 100}

_HIGHEST_LR = 0.05
"""What a long recovery starts from. A short one starts lower: it has no time to mend what high rates break."""

_FEW_SAMPLES = 8192
"""Below it a batch is half as large: an epoch of few steps teaches little."""


def check_training(config: LowerConfig) -> None:
    """UsageError for training options that cannot be carried out, before anything is read."""
    if config.train is None:
        return
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise UsageError(
            "lower was started by torchrun, but only its training runs in several processes: start it by itself with "
            "--train-processes N, or train with tools/train.py"
        )
    recovery_options(config, _FEW_SAMPLES)
    import torch

    from passes.training.devices import joined

    device, processes = config.device or "auto", config.train_processes or 1
    with joined(device) as group:
        if group.device.type != "cuda" or processes == 1:
            return
    if ":" in device:
        raise UsageError(f"--device {device}: is one GPU, --train-processes {processes} takes as many: give cuda")
    if processes > (there := torch.cuda.device_count()):
        raise UsageError(f"--train-processes {processes}: takes a GPU each, this machine has {there}; or --device cpu")


def recovery_options(config: LowerConfig, samples: int) -> RecoveryOptions:
    """The recipe for ``samples`` samples: the options that were given, the effort's and the method's for the rest."""
    from passes.training.options import TrainingOptions
    from passes.training.recovery import RecoveryOptions

    plain = RecoveryOptions().training
    epochs = config.epochs or _EPOCHS[config.effort]
    try:
        training = TrainingOptions(
            epochs=epochs,
            batch=config.batch or (plain.batch if samples > _FEW_SAMPLES else plain.batch // 2),
            lr=_lr(epochs, plain.lr) if config.lr is None else config.lr,
            weight_decay=plain.weight_decay,
            warmup=min(plain.warmup, epochs / 4),
            label_smoothing=config.label_smoothing or 0.0,
            augment=config.augment or "auto",
            held_out=plain.held_out if config.held_out is None else config.held_out,
            seed=config.seed,
        )
    except ValueError as error:
        raise UsageError(f"--train: {error}") from error
    return RecoveryOptions(training)


def _lr(epochs: int, least: float) -> float:
    """``least`` for the epochs of a quick run, twice that for four times as many, up to a limit."""
    return float(min(least * math.sqrt(max(epochs / _EPOCHS["quick"], 1.0)), _HIGHEST_LR))


@dataclass(eq=False)
class Recovery:
    """The training of one run: its data, and the dense network once it is known to be trainable."""

    config: LowerConfig
    data: TrainingSet
    augment: Augmentation
    options: RecoveryOptions
    events: RecordingEvents
    teacher: TrainableNetwork | None = None

    @classmethod
    def read(cls, config: LowerConfig, network: OnnxGraph, events: RecordingEvents) -> Recovery:
        """With the data of --train. InputError where they are unusable, UsageError for an augmentation that is not."""
        assert config.train is not None
        data = load_training(config.train, network.inputs, events)
        options = recovery_options(config, len(data))
        augment = augmentation(config.train, options.training.augment)
        try:
            data.split(options.training.held_out, options.training.seed)
        except ValueError as error:
            raise InputError(f"{config.train}: {error}") from error
        return cls(config, data, augment, options, events)

    def kept(self) -> TrainingSet:
        """The samples that are trained on: without those that the best weights are chosen by."""
        kept, _ = self.data.split(self.options.training.held_out, self.options.training.seed)
        return kept

    def digests(self) -> dict[str, str]:
        """What a state for --resume must agree with: the samples, and the script that varies them."""
        found = {"train": self.data.digest()}
        if isinstance(self.augment, ScriptAugmentation):
            assert self.config.train is not None
            found["train's script"] = file_sha256(split_source(self.config.train)[0])
        return found

    def calibration(self, inputs: tuple[TensorSpec, ...]) -> Dataset:
        """Samples that training sees, as many as calibration wants: drawn by the seed, none of them held out."""
        import torch

        from passes.training.data import generator

        kept, _ = self.data.split(self.options.training.held_out, self.config.seed)
        order = torch.randperm(len(kept), generator=generator(self.config.seed, 11))[: self.config.samples]
        batch = kept.take(order.sort().values)
        assert self.config.train is not None
        return of_arrays(self.config.train, inputs, {spec.name: batch[spec.name].numpy() for spec in inputs})

    def check(self, dense: OnnxGraph) -> None:
        """UnsupportedError with node and reason where the network cannot be trained: at once, not after the search."""
        from passes.onnx_module import to_trainable
        from passes.training.distillation import scores_kind

        with self.events.stage("check the training"):
            try:
                self.teacher = to_trainable(dense)
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.config.model}: cannot be trained, leave out --train: {error}") from error
            if scores_kind(self.teacher.module, self.data) == "values" and self.data.labels is not None:
                self.events.note("the output is no class scores: the labels of --train are not used")

    def run(self, rewritten: OnnxGraph, dense: OnnxGraph, folder: Path) -> tuple[OnnxGraph, RecoveryReport]:
        """``rewritten`` with trained weights, or as it is where no epoch was better; ``folder`` keeps the checkpoint.

        NotTrainedError where data are too few or training diverged, UnsupportedError where the rewritten network cannot
        be trained; InputError for a checkpoint that cannot be written or is refused.
        """
        from codegen.recovery_processes import train_apart
        from passes.training.devices import joined

        training, device = self.options.training, self.config.device or "auto"
        steps = self.data.split(training.held_out, training.seed)[0].steps(training.batch)
        with (
            threadpool_limits(limits=cores(), user_api="blas"),
            self.events.stage("recover", steps * training.epochs) as progress,
        ):
            watch = Watch(training.epochs, progress, self.events)
            if (processes := self.config.train_processes or 1) > 1:
                job = Job(self.config.train, self.data, self.options, device)
                return train_apart(rewritten, dense, job, folder, processes, watch)
            assert self.teacher is not None
            with joined(device) as group:
                return train(rewritten, self.teacher, self.data, self.augment, self.options, folder, group, watch)


@dataclass(frozen=True, eq=False)
class Job:
    """What training in other processes is told besides the networks; ``source`` is where the data came from."""

    source: str | None
    data: TrainingSet
    options: RecoveryOptions
    device: str


class Watching(Protocol):
    """Who is told how far training is."""

    def start(self, measure: str, before: float, dense: float | None) -> None: ...

    def step(self, step: Step) -> None: ...

    def epoch(self, epoch: Epoch) -> None: ...

    def note(self, text: str) -> None: ...


def train(
    rewritten: OnnxGraph,
    teacher: TrainableNetwork,
    data: TrainingSet,
    augment: Augmentation,
    options: RecoveryOptions,
    folder: Path,
    group: Group,
    watch: Watching,
) -> tuple[OnnxGraph, RecoveryReport]:
    """:meth:`Recovery.run` in this process, one of ``group``."""
    from passes.onnx_module import to_trainable, trained
    from passes.training.recovery import recover

    student = to_trainable(rewritten)
    found = recover(
        student, teacher, data, options, folder, group, augment=augment,
        on_start=watch.start, on_step=watch.step, on_epoch=watch.epoch, on_note=watch.note,
    )  # fmt: skip
    network = rewritten if found.kept_start else trained(rewritten, student)
    return network, _report(found, options, group)


def _report(found: Recovered, options: RecoveryOptions, group: Group) -> RecoveryReport:
    from passes.training.devices import multiplies_bf16

    precision = options.training.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(group.device) else "fp32"
    rows = tuple(
        EpochRow(e.number + 1, e.loss, e.lr, found.before if e.held_out is None else e.held_out, e.seconds)
        for e in found.run.epochs
    )
    return RecoveryReport(
        len(rows), 0 if found.kept_start else found.run.best + 1, found.measure, found.before, found.after,
        found.teacher, found.samples, found.held_out, sum(row.seconds for row in rows), str(group.device), precision,
        group.size, found.aligned, found.normalized, options.as_dict(), rows,
    )  # fmt: skip


class Watch:
    """Tells a stage's progress how far training is, and whoever reads along what each epoch came to."""

    def __init__(self, epochs: int, progress: Progress, events: RecordingEvents) -> None:
        self.epochs, self.progress, self.note = epochs, progress, events.note
        self.tell = events.inner.note  # a line per epoch is for the console; the report has the curve
        self.done, self.measure, self.last = 0, "accuracy", ""

    def start(self, measure: str, before: float, dense: float | None) -> None:
        self.measure = measure
        against = "" if dense is None else f", the dense network {score(dense, measure)}"
        self.last = f"held-out {score(before, measure)}"
        self.tell(f"recovery starts at {score(before, measure)} on held-out samples{against}")

    def step(self, step: Step) -> None:
        note = f"epoch {step.epoch + 1} of {self.epochs}, loss {step.loss:.3g}, {self.last}"
        self.progress.advance(step.number - self.done, note)
        self.done = step.number

    def epoch(self, epoch: Epoch) -> None:
        number = epoch.number + 1
        self.last = f"held-out {score(math.nan if epoch.held_out is None else epoch.held_out, self.measure)}"
        left = duration(epoch.seconds * (self.epochs - number))
        self.tell(
            f"epoch {number} of {self.epochs}: loss {epoch.loss:.4g}, {self.last}, lr {epoch.lr:.2g}, "
            f"{duration(epoch.seconds)}, {left} left"
        )


def output_error(before: OnnxGraph, after: OnnxGraph, data: Dataset) -> float:
    """Relative L2 between the outputs of two networks on ``data``, by onnxruntime; the worst output counts."""
    gaps: dict[str, float] = {}
    norms: dict[str, float] = {}
    for feeds in data.batches(64):
        for spec, wanted, found in zip(before.outputs, before.run(feeds), after.run(feeds), strict=True):
            wide = np.asarray(wanted, np.float64)
            gaps[spec.name] = gaps.get(spec.name, 0.0) + float(np.square(np.asarray(found, np.float64) - wide).sum())
            norms[spec.name] = norms.get(spec.name, 0.0) + float(np.square(wide).sum())
    return max(math.sqrt(gap / (norms[name] or 1.0)) for name, gap in gaps.items())
