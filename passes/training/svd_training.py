"""SVD training (Yang et al., arXiv 2004.09031): factors of full rank, whose singular values are thinned out.

A layer is trained as U diag(s) V of full rank, in one of two layouts of its kernel (I, O channels, k x k taps):

    channel:  V (r, I k k) as a kxk convolution, U (O, r) as a 1x1 one
    spatial:  V (r, I k) as a kx1 convolution, U (O k, r) as a 1xk one

    loss + orthogonality sum (||U^T U - I||^2 + ||V V^T - I||^2) / r^2 + sparsity sum |s|_1 / |s|_2

The last term, Hoyer's, drives energy into few singular values. Then each layer drops the smallest ones, as long as at
most a share e of the energy sum s^2 goes with them, and what is left is fine-tuned as an ordinary chain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from passes.core.factor import FactorFormat
from passes.core.formats import FORMATS
from passes.core.site import Array, Chain, Geometry, Site, Stage
from passes.errors import UsageError
from passes.ranks.candidates import chain_works
from passes.training.augment import Batch
from passes.training.factored import LayerScan, composed, site_macs
from passes.training.layers import apply
from passes.training.objective import CrossEntropy, Objective
from passes.training.progress import described

Tensor = torch.Tensor
Layout = Literal["channel", "spatial"]
Measure = Literal["hoyer", "l1"]
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class SvdOptions:
    """``orthogonality`` and ``sparsity`` weigh the two terms. ``measure``: Hoyer's ratio, or the sum of \\|s\\|.

    ``decay`` lets the weight of sparsity fall to zero towards the end of training, along a line or a half cosine, or
    keeps it.
    """

    layout: Layout = "channel"
    orthogonality: float = 1.0
    sparsity: float = 0.07
    measure: Measure = "hoyer"
    decay: Decay = "constant"

    def __post_init__(self) -> None:
        for name, known in (("layout", Layout), ("measure", Measure), ("decay", Decay)):
            if getattr(self, name) not in get_args(known):
                raise UsageError(f"{name} is {getattr(self, name)!r}; there are: {', '.join(get_args(known))}")
        if self.orthogonality < 0 or self.sparsity < 0:
            raise UsageError(
                f"the weights of orthogonality and sparsity are {self.orthogonality} and {self.sparsity}; "
                "both must be at least 0"
            )

    def sparsity_at(self, epoch: float, epochs: float) -> float:
        """The weight of sparsity after ``epoch`` of ``epochs``."""
        done = min(max(epoch / epochs, 0.0), 1.0)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.decay]
        return self.sparsity * factor


class SvdLayer(nn.Module):
    """A site as U diag(s) V: ``left`` (O, r, ...) and ``right`` (r, I, ...) as the kernels of two stages, ``s`` (r,).

    At first it equals the layer that it stands for.
    """

    def __init__(self, site: Site, layout: Layout) -> None:
        super().__init__()
        format = format_of(site, layout)
        self.format = format.name
        self.channel_axis = site.channel_axis
        self.geometries = format.geometries(site.stage.geometry)
        left, s, right = _svd(site.stage, self.geometries)
        self.left = nn.Parameter(torch.from_numpy(left).float())
        self.s = nn.Parameter(torch.from_numpy(s).float())
        self.right = nn.Parameter(torch.from_numpy(right).float())
        bias = site.stage.bias
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.geometries
        weight = self.right * self.s.reshape(-1, *(1,) * (self.right.ndim - 1))
        return apply(second, self.channel_axis, apply(first, self.channel_axis, x, weight, None), self.left, self.bias)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """U (rows, r) and V (r, columns)."""
        return self.left.movedim(1, -1).reshape(-1, len(self.s)), self.right.flatten(1)

    def chain(self, rank: int | None = None) -> Chain:
        """The ``rank`` largest singular values (all, without it) as a chain, their square roots in both stages."""
        s = self.s.detach().double().cpu().numpy()
        kept = np.sort(np.argsort(-np.abs(s), kind="stable")[: len(s) if rank is None else rank])
        root = np.sqrt(np.abs(s[kept]))
        left, right = (part.detach().double().cpu().numpy() for part in (self.left, self.right))
        first = _along(np.sign(s[kept]) * root, right.ndim, 0) * right[kept]
        second = left[:, kept] * _along(root, left.ndim, 1)
        bias = None if self.bias is None else self.bias.detach().float().cpu().numpy().copy()
        inner, outer = self.geometries
        stages = (Stage(first.astype(np.float32), None, inner), Stage(second.astype(np.float32), bias, outer))
        return Chain(stages, self.format, (len(kept),))

    def extra_repr(self) -> str:
        return f"{self.format}, {tuple(self.right.shape)}, {tuple(self.left.shape)}"


def format_of(site: Site, layout: Layout) -> FactorFormat:
    """The format of a site's two stages in a layout; layers of one tap and kernels of one axis have one only."""
    names = {"channel": ("channel_svd_out", "svd"), "spatial": ("spatial_svd_vh", "channel_svd_out", "svd")}[layout]
    return next(FORMATS[name] for name in names if FORMATS[name].full_rank(site.stage) is not None)


def orthogonality(layer: SvdLayer) -> Tensor:
    """(||U^T U - I||^2 + ||V V^T - I||^2) / r^2 in Frobenius norms."""
    u, v = layer.matrices()
    eye = torch.eye(len(layer.s), device=u.device, dtype=u.dtype)
    return ((u.T @ u - eye).square().sum() + (v @ v.T - eye).square().sum()) / len(layer.s) ** 2


def hoyer(s: Tensor) -> Tensor:
    """|s|_1 / |s|_2: 1 for a single value, sqrt(r) for r equal ones, whatever their size; 0 where all are zero."""
    return s.abs().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny).sqrt()


class SvdTraining:
    """``inner`` plus orthogonality and sparsity of every :class:`SvdLayer` of the network, in float32."""

    def __init__(self, options: SvdOptions | None = None, inner: Objective | None = None) -> None:
        self.options = options or SvdOptions()
        self.inner: Objective = inner or CrossEntropy()

    def __call__(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> Tensor:
        loss = self.inner(network, batch, epoch, epochs)
        layers = [m for m in network.modules() if isinstance(m, SvdLayer)]
        sparsity = self.options.sparsity_at(epoch, epochs)
        measure = hoyer if self.options.measure == "hoyer" else _l1
        with torch.autocast(loss.device.type, enabled=False):
            for layer in layers:
                if self.options.orthogonality:
                    loss = loss + self.options.orthogonality * orthogonality(layer)
                if sparsity:
                    loss = loss + sparsity * measure(layer.s)
        return loss

    def describe(self) -> dict[str, Any]:
        return {**vars(self.options), "inner": described(self.inner)}


def tails(s: Array) -> Array:
    """Share of the energy sum s^2 that is lost with all but the r largest values, for r = 0 to len(s); ends in 0."""
    energy = np.sort(np.square(s.astype(np.float64)))  # the smallest first, so that small ones are not lost in the sum
    lost = np.concatenate(([0.0], np.cumsum(energy)))[::-1]
    total = lost[0]
    found: Array = lost / total if total > 0 else np.zeros_like(lost)
    return found


def energy_rank(s: Array, share: float) -> int:
    """How many of the largest values keep at least 1 - ``share`` of the energy; at least 1."""
    return max(int(np.argmax(tails(s) <= share)), 1)


@dataclass(frozen=True)
class Pruning:
    """``share``: the energy that each layer may lose. ``ranks`` by site; None where the layer is dense again, since
    its chain would cost as much or more. ``macs`` of the whole network on one sample."""

    share: float
    ranks: dict[str, int | None]
    macs: int


def pruned_at(layers: LayerScan, sites: Sequence[Site], factors: Mapping[str, SvdLayer], share: float) -> Pruning:
    """The ranks that keep at least 1 - ``share`` of each layer's energy."""
    ranks: dict[str, int | None] = {}
    macs = {}
    for site in sites:
        layer = factors[site.name]
        rank = energy_rank(layer.s.detach().cpu().numpy(), share)
        cost = _rank_macs(site, layer.format, rank)
        dense = site_macs(site)
        ranks[site.name], macs[site.name] = (rank, cost) if cost < dense else (None, dense)
    return Pruning(share, ranks, layers.total_macs(macs))


def pruned_to(layers: LayerScan, sites: Sequence[Site], factors: Mapping[str, SvdLayer], limit: float) -> Pruning:
    """The least share of energy, the same for all layers, that meets ``limit`` on the network's multiply-adds.

    Ranks change at finitely many shares; those are bisected, so the answer is exact. UsageError where rank 1
    everywhere costs more.
    """
    check_reachable(layers, sites, {name: layer.format for name, layer in factors.items()}, limit)
    shares = sorted({0.0, 1.0, *(float(t) for f in factors.values() for t in tails(f.s.detach().cpu().numpy()))})
    low, high = -1, len(shares) - 1  # the first share that fits is in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        fits = pruned_at(layers, sites, factors, shares[middle]).macs <= limit
        low, high = (low, middle) if fits else (middle, high)
    return pruned_at(layers, sites, factors, shares[high])


def check_reachable(layers: LayerScan, sites: Sequence[Site], formats: Mapping[str, str], limit: float) -> None:
    """UsageError where the network has more multiply-adds than ``limit`` with rank 1 at every site."""
    least = {site.name: min(_rank_macs(site, formats[site.name], 1), site_macs(site)) for site in sites}
    if layers.total_macs(least) > limit:
        raise UsageError(
            f"no rank meets {limit:,.0f} multiply-adds: with rank 1 everywhere the network has "
            f"{layers.total_macs(least):,}; allow more, or include more layers"
        )


def pruned_chains(sites: Sequence[Site], factors: Mapping[str, SvdLayer], pruning: Pruning) -> dict[str, Chain]:
    """The chain of each site after pruning; one stage, with nothing lost, where the layer is dense again."""
    found = {}
    for site in sites:
        layer, rank = factors[site.name], pruning.ranks[site.name]
        found[site.name] = layer.chain(rank) if rank is not None else Chain((composed(site, layer.chain()),))
    return found


def _rank_macs(site: Site, format: str, rank: int) -> int:
    return sum(work.macs for work in chain_works(site, FORMATS[format], (rank,)))


def _svd(stage: Stage, geometries: tuple[Geometry, ...]) -> tuple[Array, Array, Array]:
    """The weight, unfolded as the two kernels ask, as U (O, r, *outer), s (r,) and V (r, I, *inner) in float64."""
    inner, outer = geometries
    out, channels = stage.weight.shape[:2]
    n = len(inner.kernel)
    # taps of the outer kernel go with the output channels, those of the inner one with the input channels
    rows = [2 + a for a in range(n) if outer.kernel[a] > 1]
    columns = [2 + a for a in range(n) if outer.kernel[a] == 1]
    unfolded = stage.weight.astype(np.float64).transpose(0, *rows, 1, *columns)
    height = out * int(np.prod([stage.weight.shape[a] for a in rows], dtype=int))
    u, s, v = np.linalg.svd(unfolded.reshape(height, -1), full_matrices=False)
    left = np.moveaxis(u.reshape(out, *outer.kernel, len(s)), -1, 1)
    return np.ascontiguousarray(left), s, v.reshape(len(s), channels, *inner.kernel)


def _along(values: Array, ndim: int, axis: int) -> Array:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _l1(s: Tensor) -> Tensor:
    return s.abs().sum()
