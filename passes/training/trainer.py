"""The training loop: one for every method. What differs between them is the objective and what is called each epoch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from passes.errors import InputError
from passes.training import checkpoint
from passes.training.augment import AUGMENTATIONS, Augmentation, Batch
from passes.training.data import LABELS, TrainingSet, generator
from passes.training.devices import ALONE, Group, multiplies_bf16
from passes.training.objective import Objective, scores_of
from passes.training.options import TrainingOptions

Tensor = torch.Tensor

CHECKPOINT_S = 60.0
"""A run that is killed loses at most this much, and the step it was in."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to. ``held_out``: accuracy on held-out samples (or minus the loss without labels), or None."""

    number: int
    loss: float
    lr: float
    held_out: float | None
    seconds: float


@dataclass(frozen=True)
class Step:
    """A step that was done: for a progress line. ``of`` counts all steps of the run."""

    number: int
    of: int
    epoch: int
    loss: float


@dataclass
class Run:
    """A run's outcome: the learning curve, and the epoch whose weights the network holds at the end."""

    epochs: list[Epoch] = field(default_factory=list)
    best: int = -1

    @property
    def held_out(self) -> float | None:
        return self.epochs[self.best].held_out if self.epochs else None


@dataclass(eq=False)
class Trainer:
    """Trains ``network`` in place by ``options``; everything random follows from the seed, the epoch and the step.

    ``score`` judges the network on held-out samples, higher is better; without it, accuracy where there are labels
    and minus the objective where there are none. ``folder`` keeps the checkpoint; a run that finds one there goes on
    with it, and ends with the very weights it would have had (same machine, device and number of processes).
    ``after_epoch`` may change the network (prune it, say) as long as parameters stay the same tensors.
    """

    network: nn.Module
    objective: Objective
    data: TrainingSet
    options: TrainingOptions
    folder: Path | None = None
    group: Group = ALONE
    augment: Augmentation | None = None
    score: Callable[[nn.Module, TrainingSet], float] | None = None
    on_step: Callable[[Step], None] = lambda step: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    after_epoch: Callable[[nn.Module, int], None] = lambda network, epoch: None
    keep_best: bool = True

    def run(self) -> Run:
        """Trains to the end and leaves the best weights in the network. InputError for another run's checkpoint."""
        options, group = self.options, self.group
        lay_out(self.network.to(group.device))
        kept, held = self.data.split(options.held_out, options.seed)
        kept, held = kept.to(group.device), held.to(group.device)
        module = _Loss(self.network, self.objective).to(group.device)
        optimizer = _optimizer(module, options)
        state = _State(Run())
        self._restore(module, optimizer, state)
        loss_of: Any = torch.compile(module) if options.compile else module
        if group.size > 1:
            ids = [group.device] if group.device.type == "cuda" else None
            loss_of = DistributedDataParallel(loss_of, device_ids=ids)
        while state.epoch < options.epochs:
            self._epoch(module, loss_of, optimizer, state, kept, held)
        if self.keep_best and state.best is not None:
            module.load_state_dict(state.best)
        return state.run

    def _epoch(
        self,
        module: nn.Module,
        loss_of: Any,
        optimizer: torch.optim.Optimizer,
        state: _State,
        kept: TrainingSet,
        held: TrainingSet,
    ) -> None:
        options, group = self.options, self.group
        steps, augment = kept.steps(options.batch), self.augment or AUGMENTATIONS[options.augment]
        began = saved = time.monotonic()
        parts = kept.epoch(state.epoch, options.batch, options.seed, augment, state.step, group.rank, group.size)
        module.train()
        lr = 0.0
        for batch in parts:
            at = state.epoch + state.step / steps
            lr = options.lr_at(at)
            for settings in optimizer.param_groups:
                settings["lr"] = lr
            # dropout and whatever else draws from torch's own generators: by the step, too
            torch.manual_seed(int(generator(options.seed, 3, state.epoch, state.step, group.rank).initial_seed()))
            with self.autocast():
                loss = loss_of(_laid_out(batch), at, float(options.epochs))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if options.clip_norm is not None:
                nn.utils.clip_grad_norm_(module.parameters(), options.clip_norm)
            optimizer.step()
            state.step += 1
            value = float(loss.detach())
            state.loss += value
            if not math.isfinite(value):
                raise InputError(f"training diverged in epoch {state.epoch + 1}: the loss is no number; lower the lr")
            self.on_step(Step(state.epoch * steps + state.step, steps * options.epochs, state.epoch, value))
            if self.folder is not None and time.monotonic() - saved > CHECKPOINT_S:
                self._save(module, optimizer, state, time.monotonic() - began)
                saved = time.monotonic()
        self.after_epoch(self.network, state.epoch)
        score = self._score(held) if len(held) else None
        spent = state.seconds + time.monotonic() - began
        done = Epoch(state.epoch, state.loss / max(state.step, 1), lr, score, spent)
        run = state.run
        run.epochs.append(done)
        if score is None or run.best < 0 or score >= (run.held_out or float("-inf")):
            run.best = done.number
            state.best = copy.deepcopy(module.state_dict())
        state.epoch, state.step, state.loss, state.seconds = state.epoch + 1, 0, 0.0, 0.0
        self._save(module, optimizer, state, 0.0)
        self.on_epoch(done)

    def autocast(self) -> AbstractContextManager[Any]:
        """The number format of the forward pass."""
        wanted = self.options.precision
        device = self.group.device
        if wanted == "bf16" or (wanted == "auto" and multiplies_bf16(device)):
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    def _score(self, held: TrainingSet) -> float:
        if self.score is not None:
            return self.score(self.network, held)
        if held.labels is not None:
            with self.autocast():
                return accuracy(self.network, held)
        losses = []
        self.network.eval()
        with torch.no_grad(), self.autocast():
            for batch in held.batches(250):
                losses.append(float(self.objective(self.network, batch, 0.0, 1.0)) * len(next(iter(batch.values()))))
        return -sum(losses) / len(held)

    def _key(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the recipe, the data's size, and the parameters' shapes."""
        shapes = {name: list(value.shape) for name, value in self.network.state_dict().items()}
        return {"options": self.options.as_dict(), "samples": len(self.data), "shapes": shapes}

    def _save(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: _State, seconds: float) -> None:
        if self.folder is None or not self.group.leads:
            return
        content = {
            "key": self._key(),
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "best": state.best,
            "epoch": state.epoch,
            "step": state.step,
            "loss": state.loss,
            "seconds": state.seconds + seconds,
            "epochs": [asdict(epoch) for epoch in state.run.epochs],
            "best_epoch": state.run.best,
        }
        checkpoint.save(self.folder / "training.pt", content)

    def _restore(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: _State) -> None:
        found = None if self.folder is None else checkpoint.load(self.folder / "training.pt")
        if found is None:
            return
        if found["key"] != self._key():
            raise InputError(
                f"{self.folder}: holds the checkpoint of another run (network, data or options differ); "
                "give another folder, or remove it"
            )
        module.load_state_dict(found["module"])
        optimizer.load_state_dict(found["optimizer"])
        state.best = found["best"]
        state.epoch, state.step, state.loss = found["epoch"], found["step"], found["loss"]
        state.seconds = found["seconds"]
        state.run = Run([Epoch(**epoch) for epoch in found["epochs"]], found["best_epoch"])


@dataclass
class _State:
    run: Run
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    best: dict[str, Tensor] | None = None


class _Loss(nn.Module):
    """Network and objective as one module, so that processes average the gradients of both."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, batch: Batch, epoch: float, epochs: float) -> Tensor:
        return self.objective(self.network, batch, epoch, epochs)


def _optimizer(module: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, options.lr, options.momentum, nesterov=options.momentum > 0)
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, options.lr)


def lay_out(network: nn.Module) -> None:
    """Puts every image-like weight into channels-last order, in which convolutions run faster."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _laid_out(batch: Batch) -> Batch:
    return {n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in batch.items()}


@torch.no_grad()
def accuracy(network: nn.Module, data: TrainingSet, batch: int = 250) -> float:
    """Top-1 of the network's first output on labelled samples, in inference mode. ValueError without labels."""
    if data.labels is None:
        raise ValueError("accuracy needs labels")
    network.eval()
    right = 0
    for part in data.batches(batch):
        right += int((scores_of(network, _laid_out(part)).argmax(1) == part[LABELS]).sum())
    return right / len(data)


@torch.no_grad()
def reestimate_batchnorm(network: nn.Module, data: TrainingSet, samples: int, batch: int = 250) -> None:
    """Running means and variances of every BatchNorm, anew from the first ``samples`` samples; the weights stay."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    network.train()
    for start in range(0, min(samples, len(data)), batch):
        scores_of(network, _laid_out(data.take(torch.arange(start, min(start + batch, samples, len(data))))))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
