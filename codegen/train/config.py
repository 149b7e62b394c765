"""What a training run is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codegen.budget import Budget
from passes.errors import UsageError
from passes.training.options import TrainingOptions
from passes.training.svd_training import SvdOptions

METHODS = ("dense", "elrt", "svd")


@dataclass(frozen=True)
class TrainConfig:
    """``network``: a built-in name, FILE.py:function, or an .onnx. ``train``, ``eval``: data as ``rankc lower`` has it.
    ``macs``: limit on the network's multiply-adds; ``ranks``: a plan.json with formats and ranks (elrt). ``include``
    and ``exclude``: which layers are factorized. ``inputs``: names of the network's inputs in the order of its forward,
    () for those of the data; ``outputs`` likewise, () for "logits". ``options`` are those of the first phase.
    ``orthogonality``: weight of the term in elrt's loss. ``svd``: the terms of SVD training; ``energy``: the share that
    each layer may lose in pruning, instead of ``macs``; ``finetune_epochs`` and ``finetune_lr``: after pruning, by
    default half of the epochs and a tenth of the lr.
    """

    method: str
    network: str
    train: str
    output: Path
    eval: str | None = None
    macs: str | None = None
    ranks: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    options: TrainingOptions = field(default_factory=TrainingOptions)
    orthogonality: float = 1e-3
    svd: SvdOptions = field(default_factory=SvdOptions)
    energy: float | None = None
    finetune_epochs: int | None = None
    finetune_lr: float | None = None
    device: str = "auto"
    force: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method!r}: there are {', '.join(METHODS)}")
        if self.macs is not None:
            Budget.parse("macs", self.macs)
        limits = {"--macs": self.macs, "--ranks": self.ranks, "--energy": self.energy}
        fitting = {"dense": (), "elrt": ("--macs", "--ranks"), "svd": ("--macs", "--energy")}[self.method]
        given = [name for name, value in limits.items() if value is not None]
        for name in given:
            if name not in fitting:
                raise UsageError(f"{name} does not go with --method {self.method}")
        if fitting and len(given) != 1:
            raise UsageError(f"--method {self.method} needs {' or '.join(fitting)}, one of them")
        if self.energy is not None and not 0 <= self.energy < 1:
            raise UsageError(f"--energy {self.energy}: a share of at least 0 and less than 1 may be lost")
        if self.finetune_epochs is not None and self.finetune_epochs < 1:
            raise UsageError(f"--finetune-epochs {self.finetune_epochs}: must be at least 1")
        if self.finetune_lr is not None and self.finetune_lr <= 0:
            raise UsageError(f"--finetune-lr {self.finetune_lr}: must be above 0")

    def recipe(self) -> dict[str, Any]:
        """All that the result depends on, as JSON values: two runs of one recipe are the same run."""
        own: dict[str, Any] = {
            "method": self.method,
            "network": self.network,
            "train": self.train,
            "eval": self.eval,
            "macs": self.macs,
            "ranks": None if self.ranks is None else str(self.ranks),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "options": self.options.as_dict(),
        }
        if self.method == "elrt":
            own["orthogonality"] = self.orthogonality
        if self.method == "svd":
            own["svd"] = {**vars(self.svd)}
            own |= {
                "energy": self.energy,
                "finetune_epochs": self.finetune_epochs,
                "finetune_lr": self.finetune_lr,
            }
        return own
