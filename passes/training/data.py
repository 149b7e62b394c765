"""Training data in memory, and the order in which a run sees it.

Order and augmentation follow from the seed, the epoch and the step alone. A run that was stopped goes on with the batch
that would have come, and needs no state of a generator for that.
"""

from __future__ import annotations

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
    """``count`` samples: ``inputs`` by name, one row a sample; ``labels`` (count,) of classes, or None."""

    inputs: dict[str, Tensor]
    labels: Tensor | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Array], labels: Array | None = None) -> TrainingSet:
        """From arrays of equal length; ValueError where they are not."""
        found = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        lengths = {len(tensor) for tensor in found.values()} | (set() if labels is None else {len(labels)})
        if len(lengths) != 1:
            raise ValueError(f"inputs and labels have {sorted(lengths)} samples; they need as many each")
        return cls(found, None if labels is None else torch.from_numpy(np.ascontiguousarray(labels, np.int64)))

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

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
        """The set without, and with only, a share of its samples, drawn by ``seed``: for training, and held out."""
        order = torch.randperm(len(self), generator=generator(seed, 7))
        count = round(share * len(self))
        kept, held = order[count:].sort().values, order[:count].sort().values
        return self._part(kept), self._part(held)

    def _part(self, index: Tensor) -> TrainingSet:
        labels = None if self.labels is None else self.labels[index]
        return TrainingSet({name: x[index] for name, x in self.inputs.items()}, labels)

    def steps(self, batch: int) -> int:
        """Steps an epoch has. What is left over at the end of an epoch waits for the next order."""
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
    ) -> Iterator[Batch]:
        """Epoch ``number`` from step ``start`` on, batch by batch; of each the part of one process of several."""
        order = torch.randperm(len(self), generator=generator(seed, 1, number))
        for step in range(start, self.steps(batch)):
            whole = self.take(order[step * batch : (step + 1) * batch])
            made = augment(whole, generator(seed, 2, number, step))
            yield made if ranks == 1 else {name: x[rank::ranks] for name, x in made.items()}

    def batches(self, batch: int) -> Iterator[Batch]:
        """All samples in their order, as they are."""
        for start in range(0, len(self), batch):
            yield self.take(torch.arange(start, min(start + batch, len(self))))


def generator(seed: int, *stream: int) -> torch.Generator:
    """A generator for one purpose of a run: equal numbers give equal draws, different ones unrelated draws."""
    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
