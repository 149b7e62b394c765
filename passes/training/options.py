"""How a network is trained: every number of a recipe, as plain values that a checkpoint and a report can hold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

OptimizerName = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "step"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class TrainingOptions:
    """A recipe. ``batch`` is the number of samples a step, over all devices.

    ``lr`` is the peak: it is reached after ``warmup`` epochs (a fraction is one of an epoch), linearly, and falls from
    there by ``schedule``: along a half cosine to zero, or by a tenth at each of ``milestones`` (fractions of the
    epochs). ``weight_decay`` is for weights alone, not for biases and BatchNorm. ``augment`` names an
    :data:`passes.training.augment.AUGMENTATIONS`. ``held_out`` is the share of the training set that the best
    checkpoint is chosen on. ``precision`` "auto" is bfloat16 where the processor or GPU multiplies it in hardware.
    ``clip_norm`` bounds the norm of a step's gradient. ``ema`` above zero is the decay of a running mean of the
    weights, which is then what is judged and kept.

    Raises ValueError, in one sentence, for a value that no run can have.
    """

    epochs: int = 20
    batch: int = 128
    optimizer: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 1.0
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    label_smoothing: float = 0.0
    augment: str = "none"
    held_out: float = 0.05
    clip_norm: float | None = None
    precision: Precision = "auto"
    compile: bool = False
    seed: int = 0
    ema: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("epochs", "batch", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, must be a whole number")
        hints = get_type_hints(TrainingOptions)
        for name in ("optimizer", "schedule", "precision"):
            if getattr(self, name) not in get_args(hints[name]):
                known = ", ".join(get_args(hints[name]))
                raise ValueError(f"{name} is {getattr(self, name)!r}; there are: {known}")
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs is {self.epochs} and batch {self.batch}; both must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must not be negative")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}, must be above 0 and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, must be at least 0 and finite")
        for name in ("momentum", "label_smoothing", "held_out", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0 and less than 1")
        if not 0 <= self.warmup <= self.epochs:
            raise ValueError(f"warmup is {self.warmup}, must lie between 0 and the {self.epochs} epochs")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm is {self.clip_norm}, must be above 0 and finite")
        if not all(0 < m < 1 for m in self.milestones) or sorted(set(self.milestones)) != list(self.milestones):
            raise ValueError(f"milestones are {list(self.milestones)}, must be rising fractions between 0 and 1")

    def lr_at(self, epoch: float) -> float:
        """The learning rate after ``epoch`` epochs, a fraction within one."""
        if epoch < self.warmup:
            return self.lr * min((epoch + 1e-3) / self.warmup, 1.0)
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(epoch >= m * self.epochs for m in self.milestones)
        done = min((epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9), 1.0)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values; ``TrainingOptions(**d)`` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The options there are."""
        return tuple(field.name for field in fields(cls))
