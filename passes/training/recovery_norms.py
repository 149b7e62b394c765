"""BatchNorm where there is none any more: put behind folded layers for training, and folded into them again.

    conv+bias             ->  conv+bias -> BatchNorm (the identity at first)
    conv -> conv+bias     ->  conv -> ScaleNorm -> conv+bias -> BatchNorm

A network as it is deployed has its BatchNorm folded, and without it, training diverges or crawls. The identity has
running statistics of the layer's own outputs on training data, gamma their deviation, beta their mean. A layer without
a bias must not get one, since the plan's costs are those of its shapes: it is scaled, and not shifted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from passes.core.site import Chain, Stage
from passes.training.data import TrainingSet
from passes.training.layers import ChainLayer, StageLayer, fold
from passes.training.network import TrainableNetwork
from passes.training.objective import inputs_of

Tensor = torch.Tensor
Norms = Literal["none", "biased", "all"]
"""Which convolutions get one: those with a bias, or all of them, those inside a chain as well."""

_KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


_LENGTH, _TINY, _MOST = 2.0, 1e-12, 100.0
"""What filters are as long as where networks are trained with BatchNorm, about; how much a dead one is lengthened."""


class ScaleNorm(nn.Module):
    """BatchNorm that takes no mean away: ``y = gamma x / sqrt(E[x^2] + eps)`` per channel, (N, C, *spatial).

    ``running_square`` follows the batches' mean squares by ``momentum`` and stands for them in inference mode.
    """

    running_square: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_square", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * _along(self.weight * (self.running_square + self.eps).rsqrt(), x)
        y, square = _Normalized.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.running_square.lerp_(square, self.momentum)
        return y  # type: ignore[no-any-return]

    def folded_into(self, stage: Stage) -> Stage:
        """The stage with its weight scaled; it has no bias."""
        scale = self.weight.detach().double() * (self.running_square.detach().double() + self.eps).rsqrt()
        wide = scale.cpu().numpy().reshape(-1, *(1,) * (stage.weight.ndim - 1))
        return replace(stage, weight=(stage.weight * wide).astype(stage.weight.dtype))


class _Normalized(torch.autograd.Function):
    """What ScaleNorm does to a batch, and E[x^2] (C,): half as many walks over memory as operator by operator.

    With r = 1 / sqrt(E[x^2] + eps) of a channel and n values in it: dx = gamma r (g - x r^2 sum(g x) / n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, 2, _but_channels(x), dtype=wide).square() * (x.shape[1] / x.numel())
        inverse = (square + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(square)
        return x * _along(weight * inverse, x), square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        product = (g * x).sum(_but_channels(x), dtype=inverse.dtype)
        scale = weight * inverse
        through = -scale * inverse.square() * product * (x.shape[1] / x.numel())
        dx = torch.addcmul(g * _along(scale, x), x, _along(through, x))
        return dx, (product * inverse).to(weight.dtype), None


def _but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """Values (C,) in the type of ``x`` (N, C, *spatial), to multiply it with."""
    return channels.to(x.dtype).view(1, -1, *(1,) * (x.ndim - 2))


class NormalizedChain(nn.Sequential):
    """The stages of a layer with BatchNorm after some of them. ``like``: the layer that it stands for."""

    def __init__(self, like: StageLayer | ChainLayer, norms: dict[int, nn.Module]) -> None:
        parts: list[nn.Module] = []
        for index, stage in enumerate(_stages(like)):
            parts.append(stage)
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
                stages[-1] = part.folded_into(stages[-1]) if isinstance(part, ScaleNorm) else fold(stages[-1], part)
        if self._format is None:
            return StageLayer(stages[0], axis)
        return ChainLayer(Chain(tuple(stages), *self._format), axis)


def insert(network: TrainableNetwork, data: TrainingSet, norms: Norms, batch: int = 250) -> list[str]:
    """Puts BatchNorm behind the convolutions of ``network``, and leaves what it computes in inference mode.

    Statistics are those of all samples of ``data``. Layers whose output is the network's own get none, nor do
    linear ones. Returns the sites that got one.
    """
    wanted: dict[str, list[int]] = {}
    last = _last(network)
    for site in network.layers:
        layer = network.layer(site)
        if norms == "none" or site in last or not isinstance(layer, StageLayer | ChainLayer):
            continue
        found = [
            index
            for index, stage in enumerate(_stages(layer))
            if stage.geometry.ndim and (norms == "all" or stage.bias is not None)
        ]
        if found:
            wanted[site] = found
    moments = {(site, index): _Moments() for site, found in wanted.items() for index in found}
    with _observed(network, moments), torch.no_grad():
        for part in data.batches(batch):
            network.module(*inputs_of(part))
    for site, found in wanted.items():
        like = network.layer(site)
        assert isinstance(like, StageLayer | ChainLayer)
        made = {index: _identity(_stages(like)[index], moments[site, index]) for index in found}
        network.put(site, NormalizedChain(like, made))
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
    length = stage.weight.detach().flatten(1).norm(dim=1).double()
    longer = (_LENGTH / length.clamp_min(_TINY)).clamp(max=_MOST)
    mean, variance = moments.mean.to(length.device) * longer, moments.variance.to(length.device) * longer**2
    channels = stage.weight.shape[0]
    with torch.no_grad():
        stage.weight.mul_(longer.float().view(-1, *(1,) * (stage.weight.ndim - 1)))
        if stage.bias is None:
            scale = ScaleNorm(channels)
            scale.running_square.copy_(variance + mean**2)
            scale.weight.copy_((scale.running_square.double() + scale.eps).sqrt() / longer)
            return scale.to(stage.weight.device)
        norm = _KINDS[stage.geometry.ndim](channels)
        assert norm.running_mean is not None and norm.running_var is not None
        stage.bias.mul_(longer.float())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt() / longer)
        norm.bias.copy_(mean / longer)
        return norm.to(stage.weight.device)


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
