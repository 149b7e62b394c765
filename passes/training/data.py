"""Training data in memory, and the order in which a run sees it.

Order and augmentation follow from the seed, the epoch and the step alone. A run that was stopped goes on with the batch
that would have come, and needs no state of a generator for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from passes.core.site import Array
from passes.training.augment import Augmentation, Batch, none

Tensor = torch.Tensor
LABELS = "labels"


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """``count`` samples: ``inputs`` by name, one row a sample; ``labels`` (count,) of classes, or None.

    ValueError where inputs and labels differ in length.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.inputs or any(x.ndim == 0 for x in self.inputs.values()):
            raise ValueError("a training set needs an input, and a row of each for every sample")
        if self.labels is not None and self.labels.ndim != 1:
            raise ValueError(f"labels have the shape {tuple(self.labels.shape)}, expected one class a sample")
        lengths = {len(x) for x in (*self.inputs.values(), *([] if self.labels is None else [self.labels]))}
        if len(lengths) != 1:
            raise ValueError(f"inputs and labels have {sorted(lengths)} samples; they need as many each")

    @classmethod
    def of(cls, inputs: Mapping[str, Array], labels: Array | None = None) -> TrainingSet:
        """From arrays of equal length; ValueError where they are not."""
        found = {name: _tensor(np.asarray(array)) for name, array in inputs.items()}
        return cls(found, None if labels is None else _tensor(np.asarray(labels, np.int64)))

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def size_bytes(self) -> int:
        tensors = [*self.inputs.values(), *([] if self.labels is None else [self.labels])]
        return sum(x.numel() * x.element_size() for x in tensors)

    def digest(self) -> str:
        """SHA-256 over names, shapes, types and values."""
        state = hashlib.sha256()
        labels = {} if self.labels is None else {LABELS: self.labels}
        for name, x in {**self.inputs, **labels}.items():
            array = np.ascontiguousarray(x.cpu().numpy())
            state.update(f"{name} {array.dtype.str} {array.shape};".encode())
            state.update(array.reshape(-1).view(np.uint8).data)
        return state.hexdigest()

    def to(self, device: torch.device) -> TrainingSet:
        """The same on ``device``: small sets stay there, so that a step moves nothing."""
        labels = None if self.labels is None else self.labels.to(device)
        return TrainingSet({name: x.to(device) for name, x in self.inputs.items()}, labels)

    def take(self, index: Tensor) -> Batch:
        """The samples of ``index`` (n,) as a batch: inputs by name, and "labels" where there are any."""
        batch = {name: x[index.to(x.device)] for name, x in self.inputs.items()}
        if self.labels is not None:
            batch[LABELS] = self.labels[index.to(self.labels.device)]
        return batch

    def split(self, share: float, seed: int) -> tuple[TrainingSet, TrainingSet]:
        """The set without, and with only, a share of its samples, drawn by ``seed``: for training, and held out.

        A share above zero holds at least one sample out. ValueError where it leaves none to train with.
        """
        order = torch.randperm(len(self), generator=generator(seed, 7))
        count = max(round(share * len(self)), int(share > 0))
        if count >= len(self):
            raise ValueError(f"{len(self)} samples, of which {count} are held out, leave none to train with")
        kept, held = order[count:].sort().values, order[:count].sort().values
        return self._part(kept), self._part(held)

    def head(self, count: int) -> TrainingSet:
        """The first ``count`` samples."""
        return self._part(slice(count))

    def _part(self, index: Tensor | slice) -> TrainingSet:
        labels = None if self.labels is None else self.labels[index]
        return TrainingSet({name: x[index] for name, x in self.inputs.items()}, labels)

    def steps(self, batch: int) -> int:
        """Steps an epoch has. What is left over at the end of an epoch waits for the next order.

        A set smaller than a batch is a batch.
        """
        return max(len(self) // batch, 1)

    def epoch(
        self,
        number: int,
        batch: int,
        seed: int,
        augment: Augmentation = none,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | None = None,
    ) -> Iterator[Batch]:
        """Epoch ``number`` from step ``start`` on, batch by batch; of each the part of one process of several.

        Every process draws and augments the whole batch and keeps its part: together they see what one alone would.
        ``device``: where the batch is brought before it is augmented; None leaves it where the set is.
        """
        order = torch.randperm(len(self), generator=generator(seed, 1, number))
        order = order.to(next(iter(self.inputs.values())).device)  # once, not with every step
        for step in range(start, self.steps(batch)):
            whole = self.take(order[step * batch : (step + 1) * batch])
            if device is not None:
                whole = {name: x.to(device) for name, x in whole.items()}
            made = augment(whole, generator(seed, 2, number, step))
            yield made if ranks == 1 else {name: x[rank::ranks] for name, x in made.items()}

    def batches(self, batch: int) -> Iterator[Batch]:
        """All samples in their order, as they are."""
        for start in range(0, len(self), batch):
            yield self.take(torch.arange(start, min(start + batch, len(self))))


def generator(seed: int, *stream: int) -> torch.Generator:
    """A generator for one purpose of a run: equal numbers give equal draws, different ones unrelated draws.

    The first of ``stream`` is the purpose, which decides how many follow: zeros at the end make no difference.
    """
    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _tensor(array: Array) -> Tensor:
    """A tensor of the array's own memory where it may be written to; mapped files are copied."""
    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy())
