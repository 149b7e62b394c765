"""BatchNorm where there is none any more: put behind folded layers for training, and folded into them again.

    conv+bias             ->  conv+bias -> BatchNorm (the identity at first)
    conv -> conv+bias     ->  conv of unit filters -> conv+bias -> BatchNorm

A network as it is deployed has its BatchNorm folded, and without it, training diverges or crawls. The identity has
running statistics of the layer's own outputs on training data, gamma their deviation, beta their mean. A layer without
a bias must not get one, since the plan's costs are those of its shapes: its filters are normalised instead (Salimans
and Kingma, NeurIPS 2016), which costs nothing by position, and length and direction of each are trained apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from passes.core.site import Chain, Stage
from passes.training.data import TrainingSet
from passes.training.layers import ChainLayer, StageLayer, apply, fold
from passes.training.network import TrainableNetwork
from passes.training.objective import inputs_of

Tensor = torch.Tensor
Norms = Literal["none", "biased", "all"]
"""Which convolutions are normalised: those with a bias, or all of them, those inside a chain as well."""

_KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


_LENGTH, _TINY, _MOST = 2.0, 1e-12, 100.0
"""What filters are as long as where networks are trained with BatchNorm, about; how much a dead one is lengthened."""


class UnitFilters(StageLayer):
    """A stage without a bias whose filters are ``gain v / |v|``: (O,) lengths and (O, I/groups, *kernel) directions."""

    def __init__(self, like: StageLayer) -> None:
        super().__init__(like.stage(), like.channel_axis)
        self.to(like.weight.device)
        length, longer = _lengthening(self.weight)
        self.gain = nn.Parameter(length)
        with torch.no_grad():
            self.weight.mul_(_along(longer, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.geometry, self.channel_axis, x, self._scaled(), None)

    def stage(self) -> Stage:
        return replace(super().stage(), weight=self._scaled().detach().cpu().numpy().copy())

    def _scaled(self) -> Tensor:
        lengths = self.weight.flatten(1).norm(dim=1).clamp_min(_TINY)
        return self.weight * _along(self.gain / lengths, self.weight)


class NormalizedChain(nn.Sequential):
    """The stages of a layer with BatchNorm after some of them, those without a bias with unit filters.

    ``like``: the layer that it stands for; ``norms`` by the indices of its stages.
    """

    def __init__(self, like: StageLayer | ChainLayer, norms: dict[int, nn.Module], unit: frozenset[int]) -> None:
        parts: list[nn.Module] = []
        for index, stage in enumerate(_stages(like)):
            parts.append(UnitFilters(stage) if index in unit else stage)
            if index in norms:
                parts.append(norms[index])
        super().__init__(*parts)
        self._format = None if isinstance(like, StageLayer) else (like.format, like.rank)

    def folded(self) -> StageLayer | ChainLayer:
        """The same function as in inference mode without BatchNorm, as a layer of the kind that it was."""
        stages, axis = [], 1
        for part in self:
            if isinstance(part, StageLayer):
                stages.append(part.stage())
                axis = part.channel_axis
            else:
                stages[-1] = fold(stages[-1], part)
        if self._format is None:
            return StageLayer(stages[0], axis)
        return ChainLayer(Chain(tuple(stages), *self._format), axis)


def insert(network: TrainableNetwork, data: TrainingSet, norms: Norms, batch: int = 250) -> list[str]:
    """Puts BatchNorm behind the convolutions of ``network``, and leaves what it computes in inference mode.

    Those without a bias become :class:`UnitFilters`. Statistics are those of all samples of ``data``. Layers whose
    output is the network's own stay as they are, and so do linear ones. Returns the sites that were changed.
    """
    wanted: dict[str, dict[int, StageLayer]] = {}
    last = _last(network)
    for site in network.layers:
        layer = network.layer(site)
        if norms == "none" or site in last or not isinstance(layer, StageLayer | ChainLayer):
            continue
        found = {
            index: stage
            for index, stage in enumerate(_stages(layer))
            if stage.geometry.ndim and (norms == "all" or stage.bias is not None)
        }
        if found:
            wanted[site] = found
    moments = {
        (site, index): _Moments()
        for site, found in wanted.items()
        for index, stage in found.items()
        if stage.bias is not None
    }
    with _observed(network, moments), torch.no_grad():
        for part in data.batches(batch):
            network.module(*inputs_of(part))
    for site, found in wanted.items():
        like = network.layer(site)
        assert isinstance(like, StageLayer | ChainLayer)
        made = {i: _identity(stage, moments[site, i]) for i, stage in found.items() if (site, i) in moments}
        network.put(site, NormalizedChain(like, made, frozenset(found) - made.keys()))
    return list(wanted)


def fold_all(network: TrainableNetwork) -> None:
    """Takes every BatchNorm that :func:`insert` put in out again."""
    for site in network.layers:
        layer = network.layer(site)
        if isinstance(layer, NormalizedChain):
            network.put(site, layer.folded())


class _Moments:
    """Mean and variance per channel over everything seen, in float64 (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, y: Tensor) -> None:
        channels = y.detach().transpose(0, 1).reshape(y.shape[1], -1)
        count = channels.shape[1]
        variance, mean = (found.double().cpu() for found in torch.var_mean(channels.float(), dim=1, correction=0))
        total = self.count + count
        apart = mean - self.mean
        self.squares = self.squares + variance * count + apart**2 * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        return self.squares / max(self.count, 1)


def _identity(stage: StageLayer, moments: _Moments) -> nn.Module:
    """A norm that gives what ``stage`` gave, and ``stage`` with its filters brought to one length.

    Behind a norm a filter's length means nothing but how far a step turns it: the shorter, the farther. Folding has
    made them short, some of them next to nothing.
    """
    assert stage.bias is not None
    _, longer = _lengthening(stage.weight)
    exact = longer.double()
    mean, variance = moments.mean.to(exact.device) * exact, moments.variance.to(exact.device) * exact**2
    with torch.no_grad():
        stage.weight.mul_(_along(longer, stage.weight))
        norm = _KINDS[stage.geometry.ndim](len(longer))
        assert norm.running_mean is not None and norm.running_var is not None
        stage.bias.mul_(longer)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt() / exact)
        norm.bias.copy_(mean / exact)
        return norm.to(stage.weight.device)


def _lengthening(weight: Tensor) -> tuple[Tensor, Tensor]:
    """How long each filter of a weight (O, ...) is, and what brings it to :data:`_LENGTH`: (O,) each."""
    length = weight.detach().flatten(1).norm(dim=1)
    return length, (_LENGTH / length.clamp_min(_TINY)).clamp(max=_MOST)


def _along(filters: Tensor, weight: Tensor) -> Tensor:
    """Values (O,) of filters, to multiply a weight (O, ...) with."""
    return filters.view(-1, *(1,) * (weight.ndim - 1))


@contextmanager
def _observed(network: TrainableNetwork, moments: dict[tuple[str, int], _Moments]) -> Iterator[None]:
    training = network.module.training
    network.module.eval()
    hooks = []
    for (site, index), found in moments.items():
        layer = network.layer(site)
        assert isinstance(layer, StageLayer | ChainLayer)

        def keep(_: nn.Module, __: object, y: Tensor, found: _Moments = found) -> None:
            found.add(y)

        hooks.append(_stages(layer)[index].register_forward_hook(keep))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        network.module.train(training)


def _stages(layer: StageLayer | ChainLayer) -> list[StageLayer]:
    return [layer] if isinstance(layer, StageLayer) else layer.stages()


def _last(network: TrainableNetwork) -> set[str]:
    """Sites whose layer's output leaves the network as it is."""
    (output,) = (node for node in network.module.graph.nodes if node.op == "output")
    ends = {node.target for node in output.all_input_nodes if node.op == "call_module"}
    return {site for site, path in network.layers.items() if path in ends}
