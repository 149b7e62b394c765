"""Low-rank training from scratch in Tucker-2 form, its outer factors kept near orthogonal (ELRT, arXiv 2401.10341).

A kxk convolution is trained as 1x1, kxk, 1x1 from the first step, a layer of one tap as two of them; nothing is ever
decomposed. The loss adds, for each outer factor F, the double soft orthogonality of Bansal et al. (NeurIPS 2018)

    ||F^T F - I||^2 + ||F F^T - I||^2

Ranks are the same share of every layer, as large as a limit on the multiply-adds permits, or are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import nn

from passes.core.factor import Rank, chain_of
from passes.core.formats import FORMATS
from passes.core.site import Array, Chain, Site, Stage, compose
from passes.errors import UsageError
from passes.ranks.candidates import chain_works
from passes.training.augment import Batch
from passes.training.data import generator
from passes.training.factored import LayerScan, site_macs
from passes.training.layers import ChainLayer
from passes.training.objective import CrossEntropy, Objective
from passes.training.progress import described

Tensor = torch.Tensor


@dataclass(frozen=True)
class Pick:
    """The format and rank of a site; ``format`` "dense" leaves it as it is. ``macs`` on one sample."""

    format: str
    rank: Rank
    macs: int


def double_orthogonality(factor: Tensor) -> Tensor:
    """||F^T F - I||^2 + ||F F^T - I||^2 in Frobenius norms, of F (n, r).

    Both products have the same eigenvalues but for zeros, so the smaller one gives both terms.
    """
    n, r = factor.shape
    gram = factor.T @ factor if r <= n else factor @ factor.T
    return 2 * (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).square().sum() + abs(n - r)


def outer_factors(layer: ChainLayer) -> list[Tensor]:
    """The factors that stay orthogonal, as matrices (channels, rank): first and last of three stages, the last of two.

    Of two, the other one carries the layer's scale, as the core does of three.
    """
    stages = layer.stages()
    last = stages[-1].weight
    found = [last.movedim(1, -1).reshape(-1, last.shape[1])]
    if len(stages) > 2:
        found.append(stages[0].weight.flatten(1).T)
    return found


class Elrt:
    """``inner`` plus ``weight`` times the double soft orthogonality of every chain's outer factors, in float32."""

    def __init__(self, weight: float = 1e-3, inner: Objective | None = None) -> None:
        if weight < 0:
            raise UsageError(f"the weight of orthogonality is {weight}; it must be at least 0")
        self.weight = weight
        self.inner: Objective = inner or CrossEntropy()

    def __call__(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> Tensor:
        loss = self.inner(network, batch, epoch, epochs)
        return loss + self.weight * self.penalty(network) if self.weight else loss

    def describe(self) -> dict[str, Any]:
        return {"weight": self.weight, "inner": described(self.inner)}

    def penalty(self, network: nn.Module) -> Tensor:
        """The sum over all chains of the network, without its weight."""
        layers = [m for m in network.modules() if isinstance(m, ChainLayer) and len(m) > 1]
        factors = [factor for layer in layers for factor in outer_factors(layer)]
        device = next(network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            terms = [double_orthogonality(factor.float()) for factor in factors]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=device)


def uniform_ranks(layers: LayerScan, sites: Sequence[Site], limit: float) -> dict[str, Pick]:
    """Per site the largest rank that costs at most a share q of its multiply-adds, one q for all, as large as ``limit``
    on the whole network's multiply-adds permits.

    Of Tucker-2, r1 and r2 are the same part of the input and output channels. A site stays dense where no rank is
    cheaper. UsageError where even rank 1 everywhere costs more than ``limit``.
    """
    ladders = {site.name: _ladder(site) for site in sites}
    dense = {site.name: site_macs(site) for site in sites}

    def picks(share: float) -> dict[str, Pick]:
        found = {}
        for name, ladder in ladders.items():
            fitting = [pick for pick in ladder if pick.macs <= share * dense[name]]
            found[name] = fitting[-1] if fitting else ladder[0]
        return found

    def total(share: float) -> int:
        return layers.total_macs({name: pick.macs for name, pick in picks(share).items()})

    shares = sorted({pick.macs / dense[name] for name, ladder in ladders.items() for pick in ladder} | {0.0})
    if total(0.0) > limit:
        raise UsageError(
            f"no rank meets {limit:,.0f} multiply-adds: with rank 1 everywhere the network has {total(0.0):,}; "
            "allow more, or include more layers"
        )
    low, high = 0, len(shares)  # the last share that fits is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(shares[middle]) <= limit else (low, middle)
    return picks(shares[low])


def _ladder(site: Site) -> list[Pick]:
    """Ranks of a site by rising cost, each cheaper than the dense layer, which comes last."""
    format = FORMATS["tucker2"] if FORMATS["tucker2"].full_rank(site.stage) else FORMATS["svd"]
    full = format.full_rank(site.stage)
    assert full is not None
    steps = max(full)
    ranks = [tuple(ceil(step * f / steps) for f in full) for step in range(1, steps + 1)]
    macs = [sum(work.macs for work in chain_works(site, format, rank)) for rank in ranks]
    dense = site_macs(site)
    ladder = [Pick(format.name, rank, cost) for rank, cost in zip(ranks, macs, strict=True) if cost < dense]
    assert all(a.macs <= b.macs for a, b in pairwise(ladder))
    return [*ladder, Pick("dense", (), dense)]


def given_ranks(sites: Sequence[Site], ranks: Mapping[str, tuple[str, Rank]]) -> dict[str, Pick]:
    """The picks that ``ranks`` (format and rank by site) names; UsageError where one does not fit its layer."""
    found = {}
    by_name = {site.name: site for site in sites}
    for name, (kind, rank) in ranks.items():
        if name not in by_name:
            raise UsageError(f"--ranks: {name!r} is no layer to factorize; there are {', '.join(by_name)}")
        site = by_name[name]
        if kind == "dense":
            found[name] = Pick("dense", (), site_macs(site))
            continue
        format = FORMATS.get(kind)
        full = None if format is None else format.full_rank(site.stage)
        if format is None or full is None:
            raise UsageError(f"--ranks: {name} cannot be written as {kind!r}")
        if len(rank) != len(full) or not all(1 <= r <= f for r, f in zip(rank, full, strict=True)):
            raise UsageError(f"--ranks: {name} as {kind} takes a rank from {(1,) * len(full)} to {full}, not {rank}")
        found[name] = Pick(kind, rank, sum(work.macs for work in chain_works(site, format, rank)))
    return found


def scratch_chain(site: Site, pick: Pick, draws: torch.Generator) -> Chain:
    """A chain of random weights that is as loud as the layer in whose place it stands.

    Outer factors are orthonormal, the rest is normal; the whole, multiplied out, has the Frobenius norm of the layer's
    own weight. Noise of equal power in therefore leaves with the power that the network's initialisation intended.
    """
    format = FORMATS[pick.format]
    stage = site.stage
    widths = (stage.in_channels, *format.widths(pick.rank), stage.out_channels)
    geometries = format.geometries(stage.geometry)
    weights: list[Array] = []
    for index, (geometry, inner, out) in enumerate(zip(geometries, widths, widths[1:], strict=False)):
        shape = (out, inner, *geometry.kernel)
        if index == len(geometries) - 1:
            made = _orthonormal(out * _taps(geometry.kernel), inner, draws)
            weight = np.moveaxis(made.reshape(out, *geometry.kernel, inner), -1, 1)
        elif index == 0 and len(geometries) > 2:
            weight = _orthonormal(inner * _taps(geometry.kernel), out, draws).T.reshape(shape)
        else:
            weight = torch.randn(shape, generator=draws, dtype=torch.float64).numpy()
        weights.append(np.ascontiguousarray(weight))
    stages = [Stage(weight, None, geometry) for weight, geometry in zip(weights, geometries, strict=True)]
    loudness = np.linalg.norm(stage.weight.astype(np.float64)) / np.linalg.norm(compose(tuple(stages)))
    core = 1 if len(stages) > 2 else 0
    stages[core] = replace(stages[core], weight=stages[core].weight * loudness)
    return chain_of(pick.format, pick.rank, tuple(stages), stage.bias)


def scratch_layers(sites: Sequence[Site], picks: Mapping[str, Pick], seed: int) -> dict[str, Chain]:
    """The chains of :func:`scratch_chain` by site, for all that are not to stay dense."""
    chosen = [(index, site) for index, site in enumerate(sites) if picks[site.name].format != "dense"]
    return {site.name: scratch_chain(site, picks[site.name], generator(seed, 11, index)) for index, site in chosen}


def _orthonormal(rows: int, columns: int, draws: torch.Generator) -> Array:
    """A matrix with orthonormal columns, or rows where those are fewer."""
    found: Array = nn.init.orthogonal_(torch.empty(rows, columns, dtype=torch.float64), generator=draws).numpy()
    return found


def _taps(kernel: tuple[int, ...]) -> int:
    return int(np.prod(kernel)) if kernel else 1
