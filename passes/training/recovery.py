"""Recovery: a rewritten network is trained until it says again what the dense one said.

The student comes from the pipeline, its factors fitted to calibration data: it is good already. So the learning rate is
that of fine-tuning, and the start is a checkpoint like every epoch's: what is kept is never worse on held-out samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.errors import InputError
from passes.training.augment import Augmentation
from passes.training.data import TrainingSet
from passes.training.devices import ALONE, Group
from passes.training.distillation import Distillation, Features, alignment, outputs_of, scores_kind, tapped
from passes.training.evaluation import accuracy, device_of, laid_out, lay_out
from passes.training.network import TrainableNetwork
from passes.training.objective import inputs_of
from passes.training.options import TrainingOptions
from passes.training.progress import Epoch, Run, Step
from passes.training.recovery_norms import Norms, fold_all, insert
from passes.training.trainer import Trainer


class NotTrainedError(InputError):
    """The network cannot be trained on these data by this recipe; it is what it was, and can be used as it is."""


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class RecoveryOptions:
    """How a network is recovered. ``training`` is the recipe of the loop itself.

    ``temperature``, ``alpha`` and ``beta`` weigh the objective of :mod:`passes.training.distillation`: softness of the
    teacher's scores, cross entropy with the labels, alignment of ``features``. ``norms`` says which convolutions get a
    BatchNorm while they are trained, from statistics of ``norm_samples`` samples.
    """

    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(epochs=20, batch=128, lr=0.01, weight_decay=5e-4)
    )
    temperature: float = 4.0
    alpha: float = 0.5
    beta: float = 1.0
    features: Features = "stages"
    norms: Norms = "all"
    norm_samples: int = 512

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.alpha < 0 or self.beta < 0:
            raise ValueError("the temperature must be above 0, alpha and beta at least 0")

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values, the recipe's among them."""
        own = {name: getattr(self, name) for name in ("temperature", "alpha", "beta", "features", "norms")}
        return {**self.training.as_dict(), **own}


@dataclass(frozen=True)
class Recovered:
    """What came of it. ``before``, ``after`` and ``teacher`` are scores on held-out samples, higher is better.

    ``measure``: "accuracy" where there are class scores and labels, else "-error", minus the distance of the outputs
    from the teacher's as the objective measures it. ``kept_start``: no epoch was better than the start, and the network
    is what it was. ``aligned`` names the feature maps, ``normalized`` the sites that had a BatchNorm.
    """

    run: Run
    measure: str
    before: float
    after: float
    teacher: float | None
    kept_start: bool
    samples: int
    held_out: int
    aligned: tuple[str, ...]
    normalized: tuple[str, ...]


def recover(
    student: TrainableNetwork,
    teacher: TrainableNetwork,
    data: TrainingSet,
    options: RecoveryOptions,
    folder: Path | None = None,
    group: Group = ALONE,
    *,
    augment: Augmentation | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_start: Callable[[str, float, float | None], None] = lambda measure, before, teacher: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Recovered:
    """Trains ``student`` in place; its layers stay of the kind they are, with whatever was put behind them folded in.

    ``teacher`` is left alone. Feature maps are matched by the tensors' names in both networks' sites. ``folder``,
    ``group`` and ``augment`` are the trainer's. ``on_start`` is told the measure and the held-out scores of student
    and teacher before the first step. After an error the student is as it was: NotTrainedError where the data are too
    few or training diverges, InputError where the labels do not fit and for a checkpoint that cannot be written or is
    another run's.
    """
    training = options.training
    dense, work = teacher.clone(), student.clone()
    kind = scores_kind(dense.module, data)
    if kind == "values":
        data = TrainingSet(data.inputs)
    try:
        kept, held = data.split(training.held_out, training.seed)
    except ValueError as error:
        raise NotTrainedError(f"training data: {error}") from error
    if not len(held):
        raise NotTrainedError("no training samples are held out: the best weights cannot be chosen")
    if min(training.batch, len(kept)) < group.size:
        whole = min(training.batch, len(kept))
        raise NotTrainedError(f"a batch of {whole} samples cannot be shared by {group.size} processes")
    # On the processor, where the same samples give the same bits: a resumed run must start from the same network.
    normalized = insert(work, kept.head(options.norm_samples), options.norms)
    pairs = alignment(student, teacher, options.features)
    module = tapped(work, [name for name, _ in pairs])
    objective = Distillation(
        tapped(dense, [name for _, name in pairs]), len(teacher.outputs), kind,
        temperature=options.temperature, alpha=options.alpha, beta=options.beta,
        label_smoothing=training.label_smoothing, samples=kept.head(options.norm_samples),
    )  # fmt: skip
    for one in (module, objective.teacher):
        lay_out(one.to(group.device))
    score = _Score(objective)
    before = score(module, held)
    of_teacher = score(objective.teacher, held) if score.measure(held) == "accuracy" else None
    on_start(score.measure(held), before, of_teacher)
    if training.clip_norm is None and not any(isinstance(m, _NORMS) for m in module.modules()):
        training = replace(training, clip_norm=1.0)  # without a norm in it, the first steps throw a network off
    trainer = Trainer(
        module, objective, data, training, folder=folder, group=group, augment=augment, score=score,
        on_step=on_step, on_epoch=on_epoch, on_note=on_note,
    )  # fmt: skip
    try:
        run = trainer.run()
    except InputError as error:
        # Checkpoints are written and read with finite weights: such an error is of a file, not for going on without.
        if all(bool(p.isfinite().all()) for p in module.parameters()):
            raise
        raise NotTrainedError(str(error)) from error
    reached = run.held_out
    kept_start = reached is None or not reached > before
    if not kept_start:
        work.module.load_state_dict(module.cpu().state_dict(), strict=False)
        work.module.cpu().eval()
        fold_all(work)
        student.module = work.module
    return Recovered(
        run, score.measure(held), before, before if reached is None or kept_start else reached, of_teacher, kept_start,
        len(kept), len(held), tuple(student.sites[name].input for name, _ in pairs), tuple(normalized),
    )  # fmt: skip


class _Score:
    """Judges a network on held-out samples: its accuracy, or how near its outputs are to the teacher's."""

    def __init__(self, objective: Distillation) -> None:
        self.objective = objective

    def measure(self, data: TrainingSet) -> str:
        return "accuracy" if data.labels is not None and self.objective.kind != "values" else "-error"

    def describe(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def __call__(self, network: nn.Module, data: TrainingSet) -> float:
        if self.measure(data) == "accuracy":
            return accuracy(network, data)
        network.eval()
        total, device = 0.0, device_of(network)
        for batch in data.batches(250):
            inputs = inputs_of(laid_out(batch, device))
            found, wanted = (
                outputs_of(one(*inputs))[: self.objective.outputs] for one in (network, self.objective.teacher)
            )
            total += float(self.objective.apart(found, wanted)) * len(inputs[0])
        return -total / len(data)
