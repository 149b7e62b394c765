"""A layer that is all candidates of its site at once: nested slices of one decomposition for each format.

A chain is linear, so any mixture of candidates is one convolution again, of the site's own geometry:

    sum_k g_k (W_k * x + b_k)  =  (sum_k g_k W_k) * x + sum_k g_k b_k

Candidates of one format share their factors A (O, R) and C (R, I): a rank is a mask over them, and a mixture of ranks
is a mask too, m_i = sum of g_k over the ranks above i, in W = A diag(m) C. So a step costs what the dense network
costs, and some products of weights, whatever the number of candidates; and each candidate gets its exact gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from passes.core.factor import FactorFormat, Rank
from passes.core.site import Array, Geometry, Stage
from passes.ranks.context import SiteFactors
from passes.ranks.problem import Option
from passes.training.layers import apply

Tensor = torch.Tensor


class SharedFactors(nn.Module):
    """The candidates of one format: full-size factors (g, out, in, *kernel) that all ranks are slices of.

    Of each inner channel the factors before and after are scaled to equal norms, which changes no product: gradient
    descent then treats both sides alike.
    """

    def __init__(self, format: FactorFormat, ranks: Sequence[Rank], factors: SiteFactors) -> None:
        super().__init__()
        self.widths = torch.tensor([format.widths(rank) for rank in ranks])  # (n, inner places)
        largest = tuple(max(axis) for axis in zip(*ranks, strict=True))
        stages = factors.decomposition.stages(largest)
        weights = _balanced([stage.grouped_weight() for stage in stages])
        self.factors = nn.ParameterList(nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in weights)

    def forward(self, gates: Tensor) -> Tensor:
        """The weight (g, O, I, *kernel) of the mixture with ``gates`` (n,); not normalised."""
        places = self.widths.shape[1]
        if places == 1 or (places == 2 and len(self.factors) == 3):
            masked = list(self.factors)
            mask = self._mask(gates)
            at = places - 1  # the factor that all masked channels leave or enter
            masked[at] = masked[at] * _wide(mask.T if places == 2 else mask[:, None], masked[at].ndim)
            return _composed(masked)
        parts = [g * _composed(self._slice(k)) for k, g in enumerate(gates)]
        return torch.stack(parts).sum(0)

    def _mask(self, gates: Tensor) -> Tensor:
        """What is left of each inner channel, or pair of channels: the gates of the candidates that have it."""
        full = [int(size) for size in self.widths.amax(0)]
        places = tuple((self.widths - 1).T.to(gates.device))
        mask = torch.zeros(full, device=gates.device).index_put(places, gates, accumulate=True)
        for axis in range(mask.ndim):
            mask = mask.flip(axis).cumsum(axis).flip(axis)
        return mask

    def _slice(self, k: int) -> list[Tensor]:
        widths = [int(w) for w in self.widths[k]]
        ins, outs = (None, *widths), (*widths, None)
        return [f[:, :o, :i] for f, i, o in zip(self.factors, ins, outs, strict=True)]


class SupernetLayer(nn.Module):
    """All options of a site. ``gate`` (n,) says how much of each is in the layer: one of them, or a mixture.

    The dense weight is kept beside the factors and never cut, so that a rank can grow again. Every candidate has a
    bias of its own (as candidates of different widths have norms of their own in slimmable networks: Yu et al. 2019).
    ``output`` is what the layer gave last, where ``keeps`` is set.
    """

    def __init__(
        self,
        stage: Stage,
        channel_axis: int,
        options: Sequence[Option],
        formats: Mapping[str, FactorFormat],
        factors: Mapping[str, SiteFactors],
    ) -> None:
        super().__init__()
        self.geometry: Geometry = stage.geometry
        self.channel_axis = channel_axis if stage.geometry.ndim else 1
        self.weight = nn.Parameter(torch.tensor(stage.grouped_weight(), dtype=torch.float32))
        by_format: dict[str, list[int]] = {}
        for index, option in enumerate(options):
            by_format.setdefault(option.format, []).append(index)
        dense = by_format.pop("dense")
        self.places = [torch.tensor(found) for found in (dense, *by_format.values())]
        self.shared = nn.ModuleList(
            SharedFactors(formats[name], [options[i].rank for i in found], factors[name])
            for name, found in by_format.items()
        )
        own = [stage.bias if o.format == "dense" else factors[o.format].bias_at(o.rank) for o in options]
        self.biases: nn.Parameter | None = None
        if any(bias is not None for bias in own):
            rows = [np.zeros(stage.out_channels) if bias is None else bias for bias in own]
            self.biases = nn.Parameter(torch.tensor(np.stack(rows), dtype=torch.float32))
        self.gate = torch.zeros(len(options))
        self.gate[dense[0]] = 1.0
        self.keeps = False
        self.output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.mixed()
        y = apply(self.geometry, self.channel_axis, x, weight, bias)
        self.output = y if self.keeps else None
        return y

    def mixed(self) -> tuple[Tensor, Tensor | None]:
        """Weight (O, I/groups, *kernel) and bias (O,) under the present gate."""
        gate = self.gate
        total: Tensor | None = None
        for index, places in enumerate(self.places):
            part = gate[places.to(gate.device)]
            if not gate.requires_grad and not bool(part.any()):
                continue  # nobody asks for the gradient of what is not there
            weight = self.shared[index - 1](part) if index else part.sum() * self.weight
            total = weight if total is None else total + weight
        if total is None:
            raise ValueError("a gate of zeros leaves no layer")
        bias = None if self.biases is None else gate @ self.biases
        return total.reshape(-1, *total.shape[2:]), bias


def _balanced(weights: Sequence[Array]) -> list[Array]:
    """Factors (g, out, in, *kernel) with the norms on both sides of each inner channel made equal."""
    out = [np.array(w, dtype=np.float64) for w in weights]
    for index in range(len(out) - 1):
        before, after = out[index], out[index + 1]
        left = np.linalg.norm(before.reshape(*before.shape[:2], -1), axis=2)  # (g, r)
        right = np.linalg.norm(np.moveaxis(after, 2, 1).reshape(after.shape[0], after.shape[2], -1), axis=2)
        scale = np.sqrt(np.maximum(right, _TINY) / np.maximum(left, _TINY))
        out[index] = before * scale.reshape(*scale.shape, *(1,) * (before.ndim - 2))
        out[index + 1] = after / scale.reshape(scale.shape[0], 1, scale.shape[1], *(1,) * (after.ndim - 3))
    return out


_TINY = 1e-12


def _wide(mask: Tensor, ndim: int) -> Tensor:
    """A mask (out, in) over factors (g, out, in, *kernel)."""
    return mask.reshape(1, *mask.shape, *(1,) * (ndim - 3))


def _composed(factors: Sequence[Tensor]) -> Tensor:
    """:func:`passes.core.site.compose` on grouped factors (g, out, in, *kernel), differentiable."""
    total = factors[0]
    for factor in factors[1:]:
        total = _then(total, factor)
    return total


def _then(first: Tensor, second: Tensor) -> Tensor:
    groups, inner = first.shape[:2]
    if all(min(a, b) == 1 for a, b in zip(first.shape[3:], second.shape[3:], strict=True)):
        # kernels on different axes: the taps of the one meet those of the other in one product
        ndim = first.ndim - 3
        rows = second.movedim(2, -1).reshape(groups, -1, inner)
        product = rows @ first.reshape(groups, inner, -1)
        split = product.reshape(groups, second.shape[1], *second.shape[3:], *first.shape[2:])
        taps = [axis for a in range(ndim) for axis in (2 + a, 3 + ndim + a)]
        ordered = split.permute(0, 1, 2 + ndim, *taps)
        kernel = [a * b for a, b in zip(first.shape[3:], second.shape[3:], strict=True)]
        return ordered.reshape(groups, second.shape[1], first.shape[2], *kernel)
    total: Tensor | None = None
    for tap in np.ndindex(*second.shape[3:]):
        part = second[(..., *tap)] @ first.reshape(groups, inner, -1)
        part = part.reshape(groups, second.shape[1], *first.shape[2:])
        pads = [(t, k - 1 - t) for t, k in zip(tap, second.shape[3:], strict=True)]
        part = F.pad(part, [p for pair in reversed(pads) for p in pair])
        total = part if total is None else total + part
    assert total is not None
    return total
