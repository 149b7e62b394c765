"""Data that networks are trained on: the sources of :mod:`codegen.dataset`, and augmentations by name or by script.

A loader script may define, beside its load_data(), how its samples are varied:

    def augment(batch, generator):  # tensors by input name, and "labels"; a torch.Generator for all that is random
        return batch
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codegen.dataset import Dataset, load, split_source
from codegen.dataset_files import LABELS, script_function
from codegen.events import Events, QuietEvents
from passes.errors import InputError, UsageError
from passes.graph import TensorSpec

if TYPE_CHECKING:
    import torch

    from passes.training.augment import Augmentation, Batch
    from passes.training.data import TrainingSet

FUNCTION = "augment"
"""What a loader script calls its augmentation."""


def load_training(source: str, inputs: Sequence[TensorSpec], events: Events | None = None) -> TrainingSet:
    """All samples of ``source``, in memory, one row of every input for each; with labels where the source has them.

    InputError where the source is unusable, where a sample takes more or less than one row of an input, and where
    labels are no classes.
    """
    from passes.training.data import TrainingSet

    for spec in inputs:
        lead = spec.shape[0] if spec.shape else 0
        if isinstance(lead, int) and lead != 1:
            what = "is a scalar" if not spec.shape else f"takes {lead} rows a sample"
            raise InputError(
                f"{source}: the input {spec.name!r} {what}; training needs networks that take one row of each input"
            )
    with (events or QuietEvents()).stage("read the training data") as progress:
        before = 0

        def told(rows: int) -> None:
            nonlocal before
            progress.advance(rows - before, f"{rows} samples")
            before = rows

        data = load(source, inputs, on_rows=told)
        return TrainingSet.of({spec.name: data.feeds[spec.name] for spec in inputs}, _classes(data))


def _classes(data: Dataset) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    labels = data.labels
    if labels is None:
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(
            f"{data.source}: {LABELS!r} is {labels.dtype} {labels.shape}, expected the class of each sample as an "
            f"integer: ({len(data)},)"
        )
    if len(labels) and int(labels.min()) < 0:
        raise InputError(f"{data.source}: {LABELS!r} holds the class {int(labels.min())}; classes count from 0")
    return labels.astype(np.int64)


def augmentation(source: str | None, name: str = "auto") -> Augmentation:
    """The augmentation ``name``; "script" is the one that the loader script ``source`` defines.

    "auto" is the script's own where there is one, and none elsewhere. UsageError for an unknown name, and for "script"
    where there is nothing of the kind.
    """
    from passes.training.augment import AUGMENTATIONS, none

    if name in AUGMENTATIONS:
        return AUGMENTATIONS[name]
    if name not in ("auto", "script"):
        raise UsageError(f"augmentation {name!r}: there are: {', '.join((*AUGMENTATIONS, 'script', 'auto'))}")
    path = None if source is None else split_source(source)[0]
    if path is not None and path.suffix == ".py":
        own = ScriptAugmentation.of(path)
        if own is not None:
            return own
    if name == "script":
        raise UsageError(f"augmentation 'script': {source or 'no training data'} defines no {FUNCTION}()")
    return none


class ScriptAugmentation:
    """A loader script's ``augment(batch, generator)``. What it gives back is checked: InputError names the script."""

    def __init__(self, path: Path, function: Any) -> None:
        self.where, self.function = f"{path}:{FUNCTION}", function
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    @classmethod
    def of(cls, path: Path) -> ScriptAugmentation | None:
        """None where the script defines no such function. InputError where it cannot be run."""
        function = script_function(path, FUNCTION)
        return None if function is None else cls(path, function)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        import torch

        made = self.function(dict(batch), generator)
        if not isinstance(made, dict) or set(made) != set(batch):
            got = ", ".join(map(str, made)) if isinstance(made, dict) else type(made).__name__
            raise InputError(f"{self.where}: returned {got}; expected a dict of {', '.join(batch)}")
        for name, x in batch.items():
            y = made[name]
            if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
                got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
                raise InputError(f"{self.where}: made {name!r} {got}; expected a tensor {x.dtype} {tuple(x.shape)}")
        return {name: made[name].to(x.device) for name, x in batch.items()}

    def describe(self) -> dict[str, Any]:
        return {"script": self.sha256}
