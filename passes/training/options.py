"""How a network is trained: every number of a recipe, as plain values that a checkpoint and a report can hold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TrainingOptions:
    """A recipe. Epochs may be fractions where a phase is; ``batch`` is the number of samples a step, over all devices.

    ``lr`` is the peak: it is reached after ``warmup`` epochs, linearly, and falls from there by ``schedule``: along a
    half cosine to zero, or by a tenth at each of ``milestones`` (fractions of the epochs). ``weight_decay`` is for
    weights alone, not for biases and BatchNorm. ``augment`` names an :data:`passes.training.augment.AUGMENTATIONS`.
    ``held_out`` is the share of the training set that the best checkpoint is chosen on. ``precision`` "auto" is
    bfloat16 where the processor or GPU multiplies it in hardware. ``clip_norm`` bounds the norm of a step's gradient.
    """

    epochs: int = 20
    batch: int = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 1.0
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    label_smoothing: float = 0.0
    augment: str = "none"
    held_out: float = 0.05
    clip_norm: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs is {self.epochs} and batch {self.batch}; both must be at least 1")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, must be at least 0 and less than 1")

    def lr_at(self, epoch: float) -> float:
        """The learning rate after ``epoch`` epochs, a fraction within one."""
        if epoch < self.warmup:
            return self.lr * (epoch + 1e-3) / self.warmup
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(epoch >= m * self.epochs for m in self.milestones)
        done = min((epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9), 1.0)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values; ``TrainingOptions(**d)`` reads them back, but for tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
