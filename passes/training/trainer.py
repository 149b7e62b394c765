"""The training loop: one for every method. What differs between them is the objective and what is called each epoch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.errors import InputError, UsageError, first_line
from passes.training import checkpoint
from passes.training.augment import AUGMENTATIONS, Augmentation, Batch
from passes.training.data import TrainingSet, generator
from passes.training.devices import ALONE, Group, has_room, multiplies_bf16
from passes.training.ema import AveragedWeights
from passes.training.evaluation import accuracy, laid_out, lay_out, reestimate_batchnorm
from passes.training.interrupts import Interrupt, deferred
from passes.training.objective import Objective
from passes.training.options import TrainingOptions
from passes.training.progress import Epoch, Run, State, Step, described, weights_digest
from passes.training.small_maps import SideBySide

__all__ = ["Epoch", "Run", "Step", "Trainer", "accuracy", "lay_out", "reestimate_batchnorm"]

Tensor = torch.Tensor

CHECKPOINT_S = 60.0
"""A run that is killed loses at most this much, and the step it was in."""


def _nothing(network: nn.Module, epoch: int) -> None:
    pass


@dataclass(eq=False)
class Trainer:
    """Trains ``network`` in place by ``options``; everything random follows from the seed, the epoch and the step.

    ``score`` judges the network on held-out samples, higher is better; without it, accuracy where there are labels
    and minus the objective where there are none, both in float32. Only the process that leads calls it.
    ``folder`` keeps the checkpoint, written after each epoch and every ``checkpoint_s`` seconds. A run that finds one
    there goes on with it, and ends with the very weights it would have had (on processors bit for bit, with the same
    threads and number of processes; kernels of GPUs may add up in another order). ``after_epoch`` may change the
    network (prune it, say) as long as parameters stay the same tensors and what it does depends on the network and the
    epoch alone. ``keep_best``: the network ends with the weights of the epoch that scored best, the later one of
    equals; else with those of the last. ``on_step`` is called after each step, on a GPU after every twentieth: its
    loss has to be waited for. ``augment`` stands in for the options' one.
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
    after_epoch: Callable[[nn.Module, int], None] = _nothing
    keep_best: bool = True
    checkpoint_s: float = CHECKPOINT_S
    on_note: Callable[[str], None] = lambda note: None

    def run(self) -> Run:
        """Trains to the end and leaves the best weights in the network.

        Raises InputError for another run's checkpoint, for data that are too few, and where the loss is no number any
        more (the last checkpoint stays); KeyboardInterrupt after Ctrl-C, once the checkpoint is written; RankcError
        where another process of the group is gone.
        """
        gpus = [self.group.device] if self.group.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), deferred() as interrupt:
            return _Loop(self, interrupt).run()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The number format of the forward pass, and what it takes to be fast in it."""
        wanted = self.options.precision
        device = self.group.device
        with ExitStack() as stack:
            if wanted == "bf16" or (wanted == "auto" and multiplies_bf16(device)):
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
                if device.type == "cpu" and not self.options.compile:
                    stack.enter_context(SideBySide())
            yield


class _Loop:
    """One run of a :class:`Trainer`: what it works with, and where it is."""

    def __init__(self, trainer: Trainer, interrupt: Interrupt) -> None:
        self.by, self.options, self.group, self.interrupt = trainer, trainer.options, trainer.group, interrupt
        device = self.group.device
        self.augment = trainer.augment or AUGMENTATIONS.get(self.options.augment)
        if self.augment is None:
            known = ", ".join(AUGMENTATIONS)
            raise UsageError(f"augment is {self.options.augment!r}; there are: {known}")
        if self.options.ema and trainer.after_epoch is not _nothing:
            raise UsageError("ema does not go with a change of the network after each epoch: the mean would undo it")
        try:
            kept, held = trainer.data.split(self.options.held_out, self.options.seed)
        except ValueError as error:
            raise InputError(f"training data: {error}") from error
        whole = min(self.options.batch, len(kept))
        if whole < self.group.size:
            raise InputError(f"a batch of {whole} samples cannot be shared by {self.group.size} processes")
        room = has_room(kept.size_bytes + held.size_bytes, device)
        self.kept, self.held = (kept.to(device), held.to(device)) if room else (kept, held)
        lay_out(trainer.network.to(device))
        self.module = _Loss(trainer.network, trainer.objective).to(device)
        if not any(p.requires_grad for p in self.module.parameters()):
            raise InputError("the network has no parameter that could be trained")
        self.group.state_from_leader(self.module)
        self.key = self._key() if trainer.folder is not None and self.group.leads else {}
        self.optimizer = _optimizer(self.module, self.options)
        self.mean = AveragedWeights(trainer.network, self.options.ema) if self.options.ema else None
        if self.options.precision == "bf16" and not multiplies_bf16(device):
            trainer.on_note(f"{device.type} has no products of bfloat16 in hardware: fp32 would be faster")
        self.loss_of: Callable[..., Tensor] = self.module
        if self.options.compile:
            self.loss_of = _Compiled(self.module, trainer.on_note)
        self.state = State()
        self.steps = self.kept.steps(self.options.batch)
        self.read_every = 20 if device.type == "cuda" else 1

    def run(self) -> Run:
        state = self.state = self._restored()
        while state.epoch < self.options.epochs:
            self._epoch()
        network = self.by.network
        if self.by.keep_best and state.best is not None:
            network.load_state_dict(state.best)
        elif self.mean is not None:
            network.load_state_dict(self.mean.mean)
        self.group.state_from_leader(network)
        return state.run

    def _epoch(self) -> None:
        options, group, state = self.options, self.group, self.state
        began = saved = time.monotonic()
        assert self.augment is not None
        parts = self.kept.epoch(
            state.epoch, options.batch, options.seed, self.augment, state.step, group.rank, group.size, group.device
        )
        self.module.train()
        lr = options.lr_at(state.epoch + max(state.step - 1, 0) / self.steps)
        losses: list[Tensor] = []
        for batch in parts:
            lr = options.lr_at(state.epoch + state.step / self.steps)
            # dropout and whatever else draws from torch's own generators: by the step, too
            torch.manual_seed(int(generator(options.seed, 3, state.epoch, state.step, group.rank).initial_seed()))
            loss, stop = self._step(batch, lr)
            losses.append(loss)
            state.step += 1
            if self.mean is not None:
                self.mean.update(state.epoch * self.steps + state.step)
            last = state.step == self.steps
            due = self.by.folder is not None and time.monotonic() - saved >= self.by.checkpoint_s
            if stop or due or last or state.step % self.read_every == 0:
                value = self._settle(losses)
                done = state.epoch * self.steps + state.step
                self.by.on_step(Step(done, self.steps * options.epochs, state.epoch, value))
            if (due or stop) and not last:
                self._save(state.seconds + time.monotonic() - began)
                saved = time.monotonic()
            if stop and not last:
                raise KeyboardInterrupt
        self._finish_epoch(lr, began)
        if self._stops():
            raise KeyboardInterrupt

    def _step(self, batch: Batch, lr: float) -> tuple[Tensor, bool]:
        """One update. The loss over the whole batch, and whether any process was told to stop."""
        group = self.group
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        epoch = self.state.epoch + self.state.step / self.steps
        mine, whole = len(next(iter(batch.values()))), min(self.options.batch, len(self.kept))
        with self.by.autocast():
            loss = self.loss_of(laid_out(batch), epoch, float(self.options.epochs))
        self.optimizer.zero_grad(set_to_none=True)
        if group.size == 1:
            loss.backward()  # type: ignore[no-untyped-call]
            loss, stop = loss.detach(), self.interrupt.wanted
        else:
            loss = loss * (mine / whole)  # parts of a batch may differ in size by one
            loss.backward()  # type: ignore[no-untyped-call]
            told = torch.stack([loss.detach().float(), loss.new_tensor(float(self.interrupt.wanted))])
            total = group.sum_gradients(self.module.parameters(), told)
            loss, stop = total[0], bool(total[1] > 0)
        if self.options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.options.clip_norm)
        self.optimizer.step()
        return loss, stop

    def _settle(self, losses: list[Tensor]) -> float:
        """Adds the losses since the last time to the epoch's, empties the list, and returns the newest."""
        values = [float(value) for value in torch.stack(losses).double().cpu()]
        losses.clear()
        if not all(math.isfinite(value) for value in values):
            raise self._diverged("the loss is no number")
        for value in values:  # one by one: the sum must not depend on where a checkpoint fell
            self.state.loss += value
        return values[-1]

    def _finish_epoch(self, lr: float, began: float) -> None:
        state, run = self.state, self.state.run
        self.group.state_from_leader(self.module)  # statistics of BatchNorm, which every process has of its own part
        if not all(bool(p.isfinite().all()) for p in self.by.network.parameters()):
            raise self._diverged("a weight is no number")
        torch.manual_seed(int(generator(self.options.seed, 4, state.epoch).initial_seed()))
        self.by.after_epoch(self.by.network, state.epoch)
        score = self._score() if len(self.held) else None
        spent = state.seconds + time.monotonic() - began
        run.epochs.append(Epoch(state.epoch, state.loss / self.steps, lr, score, spent))
        best = run.held_out if run.best >= 0 else None
        if not self.by.keep_best or score is None or best is None or score >= best:
            run.best = state.epoch
            if self.by.keep_best and self.group.leads:
                judged = self.by.network.state_dict() if self.mean is None else self.mean.mean
                state.best = copy.deepcopy(judged)
        state.epoch, state.step, state.loss, state.seconds = state.epoch + 1, 0, 0.0, 0.0
        self._save(0.0)
        self.by.on_epoch(run.epochs[-1])

    def _score(self) -> float:
        """The leader's judgement of the network, or of the mean of its weights, in every process."""
        value = torch.zeros((), dtype=torch.float64, device=self.group.device)
        if self.group.leads:
            with nullcontext() if self.mean is None else self.mean.in_place():
                value.fill_(self._judged())
        return float(self.group.from_leader(value))

    def _judged(self) -> float:
        if self.by.score is not None:
            found = self.by.score(self.by.network, self.held)
            return found if math.isfinite(found) else -math.inf
        if self.held.labels is not None:
            return accuracy(self.by.network, self.held)
        losses = 0.0
        self.module.eval()
        with torch.no_grad():
            for batch in self.held.batches(250):
                there = laid_out(batch, self.group.device)
                losses += float(self.by.objective(self.by.network, there, 0.0, 1.0)) * len(next(iter(batch.values())))
        return -losses / len(self.held)

    def _stops(self) -> bool:
        told = torch.tensor([float(self.interrupt.wanted)], device=self.group.device)
        return bool(self.group.sum(told) > 0)

    def _diverged(self, what: str) -> InputError:
        return InputError(f"training diverged in epoch {self.state.epoch + 1}: {what}; lower the lr")

    def _key(self) -> dict[str, Any]:
        """What a checkpoint must agree with: all that the run's weights follow from."""
        by = self.by
        return {
            "options": by.options.as_dict(),
            "data": by.data.digest(),
            "weights": weights_digest(self.module),
            "trained": [name for name, p in self.module.named_parameters() if p.requires_grad],
            "objective": described(by.objective),
            "augment": described(self.augment),
            "score": described(by.score),
            "after_epoch": described(by.after_epoch),
            "keep_best": by.keep_best,
        }

    def _save(self, seconds: float) -> None:
        if self.by.folder is None or not self.group.leads:
            return
        content = {
            "key": self.key,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": None if self.mean is None else self.mean.mean,
            **self.state.as_dict(),
            "seconds": seconds,
        }
        checkpoint.save(self._path(), content)

    def _path(self) -> Path:
        assert self.by.folder is not None
        return self.by.folder / "training.pt"

    def _restored(self) -> State:
        """Where the checkpoint says the run is, with everything loaded: the leader's file counts for all."""
        if self.by.folder is None:
            return State()
        complaint, content = "", b""
        if self.group.leads:
            try:
                content = self._own_checkpoint()
            except InputError as error:
                complaint = str(error)
        complaint = self.group.bytes_from_leader(complaint.encode()).decode()
        if complaint:
            raise InputError(complaint)
        content = self.group.bytes_from_leader(content)
        if not content:
            return State()
        found = checkpoint.decoded(content, self._path())
        try:
            self.module.load_state_dict(found["module"])
            self.optimizer.load_state_dict(found["optimizer"])
            if self.mean is not None:
                self.mean.load(found["mean"])
            return State.of(found)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            first = first_line(error)
            raise InputError(f"{self._path()}: is no whole checkpoint: {first}; remove it to start over") from error

    def _own_checkpoint(self) -> bytes:
        """The bytes of this run's checkpoint, none where there is none. InputError for another run's."""
        path = self._path()
        found = checkpoint.load(path)
        if found is None:
            return b""
        theirs = found.get("key")
        if theirs != self.key:
            names = [n for n in self.key if not isinstance(theirs, dict) or theirs.get(n) != self.key[n]]
            raise InputError(
                f"{self.by.folder}: holds the checkpoint of another run ({', '.join(names) or 'key'} differ); "
                "give another folder, or remove it"
            )
        return path.read_bytes()


class _Loss(nn.Module):
    """Network and objective as one module, so that both are compiled, saved and trained together."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, batch: Batch, epoch: float, epochs: float) -> Tensor:
        return self.objective(self.network, batch, epoch, epochs)


class _Compiled:
    """The loss as torch.compile has it; as it is where there is no compiler, or where it fails."""

    def __init__(self, module: nn.Module, note: Callable[[str], None]) -> None:
        # slow to import, and wanted by those alone who compile
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        self.plain, self.note, self.failures = module, note, (TorchDynamoException, InductorError)
        self.loss: Callable[..., Tensor] = torch.compile(module)

    def __call__(self, batch: Batch, epoch: float, epochs: float) -> Tensor:
        if self.loss is self.plain:
            return self.plain(batch, epoch, epochs)  # type: ignore[no-any-return]
        try:
            return self.loss(batch, epoch, epochs)
        except self.failures as error:
            first = first_line(error)
            self.note(f"torch.compile failed, training goes on without it: {first}")
            self.loss = self.plain
            return self.plain(batch, epoch, epochs)  # type: ignore[no-any-return]


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
