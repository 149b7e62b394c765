"""How far a training run is: what it tells whoever watches, and what its checkpoint holds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

Tensor = torch.Tensor


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


@dataclass
class State:
    """Between two steps: ``step`` steps of ``epoch`` are done, their losses add up to ``loss``.

    ``best``: the network's weights after the epoch ``run.best``, in the process that leads.
    """

    run: Run = field(default_factory=Run)
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    best: dict[str, Tensor] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "epochs": [asdict(epoch) for epoch in self.run.epochs],
            "best_epoch": self.run.best,
        }

    @classmethod
    def of(cls, found: dict[str, Any]) -> State:
        """From what :meth:`as_dict` gave. KeyError and TypeError where it is something else."""
        run = Run([Epoch(**epoch) for epoch in found["epochs"]], found["best_epoch"])
        return cls(run, found["epoch"], found["step"], found["loss"], found["seconds"], found["best"])


def described(part: object) -> Any:
    """What a checkpoint can know a function or an object by: its own description, or where it was defined."""
    if part is None:
        return None
    kind = part if callable(part) and hasattr(part, "__qualname__") else type(part)
    own = getattr(part, "describe", None)
    return {
        "kind": f"{kind.__module__}.{kind.__qualname__}",
        "with": json.loads(json.dumps(own())) if callable(own) else None,
    }


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and values of parameters and buffers."""
    state = hashlib.sha256()
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            state.update(f"{name} {value!r};".encode())
            continue
        state.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        dense = value.detach().cpu().contiguous().reshape(-1)
        state.update(np.ascontiguousarray(dense.view(torch.uint8).numpy()).data)
    return state.hexdigest()
