"""Fuses two adjacent layers of which one is pointwise, where their product is cheaper.

    conv1x1(64 -> 256) -> conv1x1(256 -> 32)
    conv1x1(64 -> 32)

Cheaper is what the latency model says, or fewer MACs where there is no model. Refuses pairs of which neither is
pointwise, whose groups or axes differ, pairs that are cheaper apart, and a biased layer before one that pads or is
transposed: the padding's zeros never got the bias, so no single layer equals the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import numpy as np

from passes.core.cost import Cost, LatencyModel, chain_work
from passes.core.site import Array, Chain, Geometry, Site, Stage, compose
from passes.graph import Graph, Note
from passes.manager import Pass, PassResult


@dataclass(frozen=True)
class FusePointwise(Pass):
    """Exact in real arithmetic; products are formed in float64 and rounded once.

    A pair is merged when the first of ``metrics`` falls by more than the model's margin and no other one rises.
    ``metrics`` are names of passes.core.cost.METRICS; without a model only "macs", "params" and "size" are known.
    """

    name: ClassVar[str] = "fuse-pointwise"

    model: LatencyModel | None = None
    metrics: tuple[str, ...] = ()

    def run(self, graph: Graph) -> PassResult:
        metrics = self.metrics or (("macs",) if self.model is None else ("latency",))
        if self.model is None and not set(metrics) <= {"macs", "params", "size"}:
            raise ValueError(f"{', '.join(metrics)} cannot be judged without a latency model")
        notes: list[Note] = []
        modified = False
        while True:
            refused: list[Note] = []
            touched: set[str] = set()
            for first, second in graph.adjacent():
                if {first.name, second.name} & touched:  # stale: the next scan sees the merged layer
                    continue
                reason = refusal(first, second)
                reason = reason or self._dearer(first, second, _outline(first.stage, second.stage), metrics)
                stage = None if reason else product_stage(first.stage, second.stage)
                reason = reason if stage is None else _overflow(stage)
                if stage is None or reason:
                    refused.append(Note(second.name, second.op, f"not fused with {first.name}: {reason}"))
                    continue
                graph.merge(first, second, stage)
                touched |= {first.name, second.name}
                notes.append(Note(second.name, second.op, f"fused with {first.name}"))
            if not touched:
                return PassResult(modified, (*notes, *refused))
            modified = True

    def _dearer(self, first: Site, second: Site, stage: Stage, metrics: tuple[str, ...]) -> str:
        """Why the product is no gain; empty when it is one."""
        apart_work = (*chain_work(Chain((first.stage,)), first), *chain_work(Chain((second.stage,)), second))
        works = (apart_work, chain_work(Chain((stage,)), first))
        if self.model is None:
            margin = 0.0
            costs = [Cost(macs=sum(work.macs for work in pair)) for pair in works]
        else:
            margin = self.model.margin
            costs = self.model.chains(works)
        apart, fused = (
            cost.with_weights(params, 4 * params)
            for cost, params in zip(costs, (first.stage.params + second.stage.params, stage.params), strict=True)
        )
        main = metrics[0]
        if not fused.metric(main) < apart.metric(main) * (1 - margin):
            return f"{main} would go from {apart.metric(main):.6g} to {fused.metric(main):.6g}"
        for metric in metrics[1:]:
            if fused.metric(metric) > apart.metric(metric):
                return f"{metric} would rise from {apart.metric(metric):.6g} to {fused.metric(metric):.6g}"
        return ""


def refusal(first: Site, second: Site) -> str:
    """Why two adjacent sites have no product stage; empty when they have one."""
    a, b = first.stage.geometry, second.stage.geometry
    if a.ndim != b.ndim or first.channel_axis != second.channel_axis:
        return "they do not work along the same axes"
    if not (a.is_pointwise or b.is_pointwise):
        return "neither is pointwise"
    if a.groups != b.groups:
        return f"they have {a.groups} and {b.groups} groups"
    biased = first.stage.bias is not None and bool(np.any(first.stage.bias))
    if biased and not b.is_pointwise and (any(b.pads) or b.transposed):
        return f"the bias of {first.name} does not reach the padding"
    return ""


def product_stage(first: Stage, second: Stage) -> Stage:
    """The one stage that equals ``first`` then ``second``; for pairs that :func:`refusal` lets through.

    With y = A x + a and z = B y + b:  z = (B A) x + (sum of B's taps) a + b, since every tap of B meets the bias a.
    """
    pair = tuple(replace(s, weight=s.weight.astype(np.float64)) for s in (first, second))
    geometry = _geometry(first.geometry, second.geometry)
    product = compose(pair)
    dtype = np.result_type(first.weight, second.weight)
    with np.errstate(over="ignore", invalid="ignore"):
        weight = product.reshape(second.out_channels, -1, *geometry.kernel).astype(dtype)
    if first.bias is None and second.bias is None:
        return Stage(weight, None, geometry)
    bias: Array = np.zeros(second.out_channels) if second.bias is None else second.bias.astype(np.float64)
    if first.bias is not None:
        wide = pair[1].grouped_weight()
        taps = wide.reshape(*wide.shape[:3], prod(wide.shape[3:])).sum(axis=3)  # (g, O/g, I/g)
        moved = np.einsum("goi,gi->go", taps, first.bias.reshape(taps.shape[0], -1).astype(np.float64))
        bias = bias + moved.reshape(-1)
    return Stage(weight, bias.astype(dtype), geometry)


def _outline(first: Stage, second: Stage) -> Stage:
    """The product stage with no values in it: what it costs is known before it is formed."""
    geometry = _geometry(first.geometry, second.geometry)
    zero = np.zeros((), np.result_type(first.weight, second.weight))
    weight = np.broadcast_to(zero, (second.out_channels, first.weight.shape[1], *geometry.kernel))
    biased = first.bias is not None or second.bias is not None
    return Stage(weight, np.broadcast_to(zero, (second.out_channels,)) if biased else None, geometry)


def _overflow(stage: Stage) -> str:
    arrays = [stage.weight] if stage.bias is None else [stage.weight, stage.bias]
    return "" if all(np.isfinite(array).all() for array in arrays) else "their product overflows"


def _geometry(first: Geometry, second: Geometry) -> Geometry:
    """That of the stage which is not pointwise."""
    return first if second.is_pointwise else second
