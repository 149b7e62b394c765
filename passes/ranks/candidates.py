"""The candidates of a site: formats and ranks worth an error estimate, priced in one batch.

Ranks follow the target's latency staircase: of all ranks on one step the largest is kept, because the others cost as
much and lose more. A chain that is not cheaper than the dense layer by more than the margin is never a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np

from passes.core.cost import Cost, LatencyModel, StageWork
from passes.core.factor import FactorFormat, Rank
from passes.core.site import Array, Site


@dataclass(frozen=True)
class Candidate:
    """A format and rank at a site, with its price. ``format`` None is the dense layer."""

    format: FactorFormat | None
    rank: Rank
    cost: Cost

    @property
    def name(self) -> str:
        return "dense" if self.format is None else self.format.name


@dataclass(frozen=True)
class CandidateLimits:
    """How many ranks of a format are looked at (``per_axis`` for each rank of a format with several)."""

    per_format: int = 24
    per_axis: int = 8


def candidates(
    sites: Sequence[Site],
    formats: Mapping[str, FactorFormat],
    model: LatencyModel,
    bytes_per_weight: Mapping[str, int],
    limits: CandidateLimits | None = None,
    margin: float | None = None,
) -> dict[str, tuple[Candidate, ...]]:
    """Candidates by site name, the dense one first. ``bytes_per_weight`` by site name is the file's own width.

    Sites of one shape share them.
    """
    margin = model.margin if margin is None else margin
    shapes = {site.name: (dense_work(site), bytes_per_weight[site.name]) for site in sites}
    firsts: dict[tuple[StageWork, int], Site] = {}
    for site in sites:
        firsts.setdefault(shapes[site.name], site)
    found = _candidates(list(firsts.values()), formats, model, bytes_per_weight, limits or CandidateLimits(), margin)
    return {site.name: found[firsts[shapes[site.name]].name] for site in sites}


def _candidates(
    sites: Sequence[Site],
    formats: Mapping[str, FactorFormat],
    model: LatencyModel,
    bytes_per_weight: Mapping[str, int],
    limits: CandidateLimits,
    margin: float,
) -> dict[str, tuple[Candidate, ...]]:
    dense_works = [(dense_work(site),) for site in sites]
    requests: list[tuple[Site, FactorFormat, Rank]] = []
    for site in sites:
        for format in formats.values():
            full = format.full_rank(site.stage)
            if full is not None:
                taps = prod(site.stage.geometry.kernel)
                grid = _grid(full, model.granularity, limits)
                requests.extend((site, format, rank) for rank in grid if _fillable(rank, taps))
    works = [chain_works(site, format, rank) for site, format, rank in requests]
    prices = model.chains([*dense_works, *works])
    dense = dict(zip((s.name for s in sites), prices, strict=False))
    grouped: dict[tuple[str, str], list[Candidate]] = {}
    for (site, format, rank), work, price in zip(requests, works, prices[len(sites) :], strict=True):
        if price.latency < dense[site.name].latency * (1 - margin):
            cost = _with_weights(price, work, bytes_per_weight[site.name])
            grouped.setdefault((site.name, format.name), []).append(Candidate(format, rank, cost))
    result = {}
    for site, work in zip(sites, dense_works, strict=True):
        kept = [Candidate(None, (), _with_weights(dense[site.name], work, bytes_per_weight[site.name]))]
        for format in formats.values():
            found = grouped.get((site.name, format.name), [])
            several = bool(found) and len(found[0].rank) > 1
            kept.extend(_pareto(found) if several else staircase(found, limits.per_format))
        result[site.name] = tuple(kept)
    return result


def dense_work(site: Site) -> StageWork:
    """The site's own layer as work."""
    stage = site.stage
    return StageWork(
        stage.geometry, stage.in_channels, stage.out_channels, site.spatial, site.batch, stage.bias is not None
    )


def chain_works(site: Site, format: FactorFormat, rank: Rank) -> tuple[StageWork, ...]:
    """The works of the chain that ``format`` makes at ``rank``, without making it. The bias is on the last stage."""
    stage, groups = site.stage, site.stage.geometry.groups
    geometries = format.geometries(stage.geometry)
    widths = (stage.in_channels, *(groups * w for w in format.widths(rank)), stage.out_channels)
    works = []
    spatial = site.spatial
    for index, geometry in enumerate(geometries):
        last = index == len(geometries) - 1
        works.append(StageWork(geometry, widths[index], widths[index + 1], spatial, site.batch, last))
        spatial = works[-1].output_spatial if geometry.ndim else spatial
    return tuple(works)


def _with_weights(cost: Cost, works: tuple[StageWork, ...], width: int) -> Cost:
    params = sum(w.weights + (w.out_channels if w.bias else 0) for w in works)
    return replace(cost.with_weights(params, params * width), macs=sum(w.macs for w in works))


def _grid(full: Rank, step: int, limits: CandidateLimits) -> list[Rank]:
    """Ranks to price: all multiples of the step for one axis, a product of steps for several."""
    if len(full) == 1:
        ranks = sorted({*range(step, full[0] + 1, step), full[0]})
        return [(r,) for r in ranks]
    axes = []
    for size in full:
        steps = sorted({*range(step, size + 1, max(step, 1)), size})
        # at most per_axis x 3 values an axis are priced: every one at small sizes, a geometric series at large ones
        if len(steps) > 3 * limits.per_axis:
            series = np.unique(np.geomspace(1, len(steps), 3 * limits.per_axis).astype(int)) - 1
            multiples = [i for i, s in enumerate(steps) if s % 16 == 0][:: max(1, len(steps) // 256)]
            steps = [steps[i] for i in sorted({*series.tolist(), *multiples[:24]})]
        axes.append(steps)
    return list(product(*axes))


def _fillable(rank: Rank, taps: int) -> bool:
    """False where one of two ranks exceeds what a kernel of ``taps`` taps can carry from the other."""
    return len(rank) < 2 or max(rank) <= min(rank) * taps


def staircase(found: Sequence[Candidate], limit: int) -> list[Candidate]:
    """From the largest rank down, those that are cheaper than every larger one kept; at most ``limit`` of them.

    The relative gain that counts as a step starts at 0.1 % and is doubled until few enough are left.
    """
    ordered = sorted(found, key=lambda c: c.rank, reverse=True)
    step = 1e-3
    while True:
        kept: list[Candidate] = []
        for candidate in ordered:
            if not kept or candidate.cost.latency < kept[-1].cost.latency * (1 - step):
                kept.append(candidate)
        if len(kept) <= limit:
            return kept
        step *= 2


def _pareto(found: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with several ranks such that no other one is at least as large in every rank and no dearer."""
    if not found:
        return []
    ranks = np.array([c.rank for c in found])
    latency = np.array([c.cost.latency for c in found])
    kept = []
    for index in range(len(found)):
        larger = (ranks >= ranks[index]).all(axis=1) & (latency <= latency[index])
        larger[index] = False
        same = (ranks == ranks[index]).all(axis=1)
        if not (larger & ~same).any():
            kept.append(index)
    return _spread([found[i] for i in kept], 96)


def _spread(found: list[Candidate], limit: int) -> list[Candidate]:
    """At most ``limit`` candidates, evenly over the order of their latencies."""
    if len(found) <= limit:
        return found
    order = sorted(found, key=lambda c: (c.cost.latency, c.rank))
    picks: Array = np.unique(np.linspace(0, len(order) - 1, limit).astype(int))
    return [order[i] for i in picks]
