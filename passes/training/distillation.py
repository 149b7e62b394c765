"""What a rewritten network learns from: the dense one's outputs and features, and the labels where there are any.

    loss = T^2 KL(teacher / T || student / T) + alpha CE(student, labels) + beta mean(|f - f'|^2 / max(|f'|^2, c))

Hinton, Vinyals and Dean 2015, eq. 1 to 4, with hints (Romero et al. 2015) that need no regressor: factors do not change
the width of a feature map. Outputs that are no class scores are compared by their relative squared error instead. The
means are over samples, each with its own norm and a c that no batch changes: the gradients of a batch's parts, in
several processes, average to the whole batch's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from passes.errors import InputError
from passes.training.augment import Batch
from passes.training.data import LABELS, TrainingSet
from passes.training.network import TrainableNetwork
from passes.training.objective import inputs_of
from passes.training.progress import weights_digest

Tensor = torch.Tensor
Features = Literal["none", "stages", "all"]
"""Which feature maps are aligned: those that a layer reads where the resolution changes, or all that a layer reads."""

Scores = Literal["logits", "probabilities", "values"]
"""What the first output is: scores before or after a softmax, or no class scores at all."""

_TINY = 1e-12

_FLOOR = 0.1
"""The least that a sample's error is divided by, of the mean |f'|^2: a map near zero counts ten times at most."""


def scores_kind(network: nn.Module, data: TrainingSet) -> Scores:
    """What kind of output the network has, by what it says of a few samples: (N, C) with C > 1 is class scores.

    InputError for labels that are no class of it.
    """
    with torch.no_grad():
        first = outputs_of(network.eval()(*inputs_of(data.take(torch.arange(min(len(data), 8))))))[0]
    if first.ndim != 2 or first.shape[1] < 2 or not first.is_floating_point():
        return "values"
    if data.labels is not None:
        low, high = int(data.labels.min()), int(data.labels.max())
        if low < 0 or high >= first.shape[1]:
            raise InputError(f"labels run from {low} to {high}, but the network tells {first.shape[1]} classes apart")
    sums = first.float().sum(1)
    if bool((first >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        return "probabilities"
    return "logits"


def alignment(student: TrainableNetwork, teacher: TrainableNetwork, features: Features) -> list[tuple[str, str]]:
    """Pairs of sites, of the student and of the teacher, that read one and the same feature map.

    Maps are known by their tensor's name, which rewriting keeps at both ends of a chain.
    """
    if features == "none":
        return []
    readers: dict[str, str] = {}
    for name, site in student.sites.items():
        readers.setdefault(site.input, name)
    pairs: dict[str, tuple[str, str]] = {}
    spatial: tuple[int, ...] | None = None
    for name, site in teacher.sites.items():
        after = site.stage.geometry.output_spatial(site.spatial) if site.stage.geometry.ndim else ()
        turns = spatial is not None and site.spatial != spatial
        shrinks = spatial is not None and after != site.spatial
        spatial = after
        fits = site.input in readers and site.input not in teacher.inputs
        if fits and (features == "all" or turns or shrinks):
            pairs.setdefault(site.input, (readers[site.input], name))
    return list(pairs.values())


def tapped(network: TrainableNetwork, sites: Sequence[str]) -> torch.fx.GraphModule:
    """The network's module, sharing its layers, with what each of ``sites`` reads as further outputs.

    They are copies: an operator that works in place must not change what was kept.
    """
    graph = copy.deepcopy(network.module.graph)
    calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
    kept = []
    for site in sites:
        read = calls[network.layers[site]].args[0]
        assert isinstance(read, torch.fx.Node)
        with graph.inserting_after(read):
            kept.append(graph.call_method("clone", (read,)))
    (output,) = (node for node in graph.nodes if node.op == "output")
    given = output.args[0]
    outputs = tuple(given) if isinstance(given, tuple | list) else (given,)
    output.args = ((*outputs, *kept),)
    graph.lint()
    return torch.fx.GraphModule(network.module, graph)


class Distillation:
    """The objective of the module's docstring, for tapped networks with ``outputs`` outputs of their own.

    ``teacher`` is never trained. ``alpha`` and ``label_smoothing`` are for labels, where a batch has them; the
    temperature is for class scores. ``samples`` tell how large the teacher's maps and outputs are: relative errors are
    divided by a tenth of their mean square at least, without samples by whatever a sample has.
    """

    def __init__(
        self,
        teacher: nn.Module,
        outputs: int,
        kind: Scores,
        *,
        temperature: float,
        alpha: float,
        beta: float,
        label_smoothing: float,
        samples: TrainingSet | None = None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.outputs, self.kind = outputs, kind
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.label_smoothing = label_smoothing
        self.floors = None if samples is None else _floors(self.teacher, samples)  # follow from teacher and data

    def describe(self) -> dict[str, Any]:
        names = ("outputs", "kind", "temperature", "alpha", "beta", "label_smoothing")
        return {"teacher": weights_digest(self.teacher), **{name: getattr(self, name) for name in names}}

    def __call__(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> Tensor:
        inputs = inputs_of(batch)
        with torch.no_grad():
            wanted = outputs_of(self.teacher(*inputs))
        found = outputs_of(network(*inputs))
        loss = self.apart(found[: self.outputs], wanted[: self.outputs])
        if self.kind != "values" and self.alpha > 0 and LABELS in batch:
            scores = self._scores(found[0])
            loss = loss + self.alpha * F.cross_entropy(scores, batch[LABELS], label_smoothing=self.label_smoothing)
        features = range(self.outputs, len(wanted))
        if features and self.beta > 0:
            parts = [relative_square(found[i], wanted[i], self._floor(i)) for i in features]
            loss = loss + self.beta * sum(parts) / len(parts)
        return loss

    def apart(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """How far the outputs are from the teacher's."""
        pairs = list(enumerate(zip(found, wanted, strict=True)))
        total = torch.zeros((), device=found[0].device)
        if self.kind != "values":
            f, w = (self._scores(x) / self.temperature for x in pairs.pop(0)[1])
            kl = F.kl_div(F.log_softmax(f, 1), F.log_softmax(w, 1), log_target=True, reduction="batchmean")
            total = total + kl * self.temperature**2
        for index, (f, w) in pairs:
            if w.is_floating_point():
                total = total + relative_square(f, w, self._floor(index))
        return total

    def _floor(self, index: int) -> float:
        return _TINY if self.floors is None else self.floors[index]

    def _scores(self, x: Tensor) -> Tensor:
        return x.float() if self.kind == "logits" else x.float().clamp_min(_TINY).log()


def relative_square(found: Tensor, wanted: Tensor, floor: float = _TINY) -> Tensor:
    """Mean over samples, the first axis, of |found - wanted|^2 / max(|wanted|^2, floor)."""
    wanted = wanted.float()
    return (_squares(found.float() - wanted) / _squares(wanted).clamp_min(floor)).mean()


def _squares(x: Tensor) -> Tensor:
    """|x|^2 of each sample, (N,)."""
    return x.square().reshape(len(x) if x.ndim else 1, -1).sum(1)


@torch.no_grad()
def _floors(teacher: nn.Module, samples: TrainingSet) -> list[float]:
    """What a sample's error is divided by at least, for each output of the teacher."""
    sums: list[float] = []
    for batch in samples.batches(64):
        made = [float(_squares(x.float()).double().sum()) for x in outputs_of(teacher(*inputs_of(batch)))]
        sums = [a + b for a, b in zip(sums or [0.0] * len(made), made, strict=True)]
    return [max(_FLOOR * total / len(samples), _TINY) for total in sums]


def outputs_of(found: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """What a network gave, as a tuple where it is a single tensor too."""
    return tuple(found) if isinstance(found, tuple | list) else (found,)
