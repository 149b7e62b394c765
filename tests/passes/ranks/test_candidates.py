from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.core.cost import Cost, chain_work
from passes.core.factor import chain_of
from passes.core.fit import FitProblem
from passes.core.formats import FORMATS
from passes.core.site import Geometry, Site, Stage
from passes.ranks.candidates import Candidate, CandidateLimits, candidates, chain_works, dense_work, staircase
from tests.passes.ranks.prices import TiledPrices

MANY = CandidateLimits(per_format=1000, per_axis=1000)


def site(name: str, outs: int, ins: int, geometry: Geometry, spatial: tuple[int, ...] = (), bias: bool = True) -> Site:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outs, ins // geometry.groups, *geometry.kernel)).astype(np.float32)
    stage = Stage(weight, np.zeros(outs, np.float32) if bias else None, geometry)
    shape = (2, ins, *spatial)
    out = (2, outs, *geometry.output_spatial(spatial))
    return Site(name, "Conv" if spatial else "Gemm", stage, "x", name, shape, out, 1)


SITES = [
    site("conv", 24, 20, Geometry((3, 3), (2, 2), pads=(1, 1, 1, 1)), (8, 8)),
    site("unbiased", 24, 20, Geometry((3, 3)), (6, 6), bias=False),
    site("grouped", 24, 24, Geometry((3, 3), pads=(1, 1, 1, 1), groups=2), (6, 6)),
    site("point", 30, 21, Geometry((1, 1), (2, 2)), (7, 7)),
    site("deconv", 12, 10, Geometry((4, 4), (2, 2), pads=(1, 1, 1, 1), transposed=True), (5, 5)),
    site("linear", 40, 30, Geometry()),
]
WIDTHS = {s.name: 4 for s in SITES}


def found(model: TiledPrices, limits: CandidateLimits | None = MANY, margin: float | None = None) -> dict[str, tuple]:
    return candidates(SITES, FORMATS, model, WIDTHS, limits, margin)


def all_prices(model: TiledPrices, at: Site, name: str) -> dict[tuple[int, ...], float]:
    """The price of every rank of a format with one rank."""
    (full,) = FORMATS[name].full_rank(at.stage)
    ranks = [(r,) for r in range(1, full + 1)]
    costs = model.chains([chain_works(at, FORMATS[name], r) for r in ranks])
    return {r: c.latency for r, c in zip(ranks, costs, strict=True)}


@pytest.mark.parametrize("at", SITES, ids=lambda s: s.name)
def test_the_largest_rank_of_every_step_is_kept_and_no_other(at: Site) -> None:
    model = TiledPrices()
    kept = found(model)[at.name]
    for name, format in FORMATS.items():
        full = format.full_rank(at.stage)
        if full is None or len(full) > 1:
            continue
        prices = all_prices(model, at, name)
        (dense,) = model.chains([(dense_work(at),)])
        # a step's largest rank is one that every larger rank costs more than; steps under a thousandth do not count,
        # and there are none here
        wanted = {
            r for r, p in prices.items() if p < dense.latency and all(prices[o] > p for o in prices if o[0] > r[0])
        }
        assert {c.rank for c in kept if c.name == name} == wanted
        assert wanted or at.name == "grouped"


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.6])
def test_no_candidate_is_dearer_than_dense_less_the_margin(margin: float) -> None:
    for by_model in (True, False):  # the model's own margin, or one given in its place
        model = TiledPrices(margin=margin if by_model else 0.9)
        for kept in found(model, margin=None if by_model else margin).values():
            dense, *others = kept
            assert dense.name == "dense" and dense.format is None and dense.rank == ()
            assert all(c.format is not None and c.cost.latency < dense.cost.latency * (1 - margin) for c in others)
    assert sum(len(kept) for kept in found(TiledPrices(margin=margin)).values()) > len(SITES)


def test_a_target_on_which_every_chain_is_slower_leaves_the_layers_alone() -> None:
    kept = found(TiledPrices(start=10**7))
    assert [[c.name for c in options] for options in kept.values()] == [["dense"]] * len(SITES)


@pytest.mark.parametrize("at", SITES, ids=lambda s: s.name)
def test_a_candidate_is_priced_as_the_chain_that_it_will_be(at: Site) -> None:
    model = TiledPrices()
    weight = at.stage.grouped_weight().astype(np.float64)
    seen = set()
    for candidate in found(model)[at.name][1:]:
        if candidate.name in seen:
            continue
        seen.add(candidate.name)
        decomposed = candidate.format.decompose(at.stage.geometry, FitProblem(weight))
        # the chain as it is written always has a bias at its end: a fit makes one
        chain = chain_of(
            candidate.name, candidate.rank, decomposed.stages(candidate.rank), np.zeros(len(weight[0]) * len(weight))
        )
        works = chain_works(at, candidate.format, candidate.rank)
        assert works == chain_work(chain, at)
        assert candidate.cost.latency == model.chains([works])[0].latency
        assert candidate.cost.params == chain.params
        assert candidate.cost.size_bytes == 4 * chain.params
        assert candidate.cost.macs == sum(w.macs for w in works)
    assert seen


def test_the_dense_candidate_is_the_layer() -> None:
    for at in SITES:
        dense = found(TiledPrices())[at.name][0]
        assert dense.cost.params == at.stage.params
        assert dense.cost.macs == dense_work(at).macs
        assert dense_work(at).weights == at.stage.weight.size


def test_no_kept_pair_of_ranks_is_beaten_in_both_at_no_higher_price() -> None:
    model = TiledPrices()
    for at in SITES:
        pairs = [c for c in found(model)[at.name] if c.name == "tucker2"]
        for a in pairs:
            for b in pairs:
                larger = all(x >= y for x, y in zip(a.rank, b.rank, strict=True)) and a.rank != b.rank
                assert not (larger and a.cost.latency <= b.cost.latency)
            # and a core cannot carry more channels than its taps give it
            assert max(a.rank) <= min(a.rank) * int(np.prod(at.stage.geometry.kernel))


def test_ranks_come_in_the_targets_granularity_or_full() -> None:
    for at, kept in zip(SITES, found(TiledPrices(granularity=4)).values(), strict=True):
        for c in kept[1:]:
            full = c.format.full_rank(at.stage)
            assert all(r % 4 == 0 or r == f for r, f in zip(c.rank, full, strict=True))


def test_one_batch_of_prices_for_everything() -> None:
    model = TiledPrices()
    found(model)
    assert len(model.asked) == 1


def test_the_limits_hold() -> None:
    kept = found(TiledPrices(tile=1), CandidateLimits(per_format=5, per_axis=2))
    for options in kept.values():
        names = [c.name for c in options]
        assert all(names.count(n) <= 5 for n in names if n not in ("dense", "tucker2"))
        assert names.count("tucker2") <= 96
    assert any([c.name for c in options].count("svd") > 1 for options in kept.values())


@given(
    latencies=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    limit=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_a_staircase_falls_from_its_largest_rank(latencies: list[int], limit: int, seed: int) -> None:
    steps = [Candidate(None, (r + 1,), Cost(float(t))) for r, t in enumerate(latencies)]
    mixed = [steps[i] for i in np.random.default_rng(seed).permutation(len(steps))]
    kept = staircase(mixed, limit)
    assert 1 <= len(kept) <= limit
    assert kept[0] is steps[-1]
    for first, second in pairwise(kept):
        assert second.rank < first.rank and second.cost.latency < first.cost.latency
    # every one is the largest rank at its price or less
    for candidate in kept:
        assert all(s.cost.latency > candidate.cost.latency for s in steps if s.rank > candidate.rank)


def test_a_staircase_skips_steps_under_a_thousandth() -> None:
    def at(rank: int, latency: float) -> Candidate:
        return Candidate(None, (rank,), replace(Cost(), latency=latency))

    kept = staircase([at(3, 10000.0), at(2, 9995.0), at(1, 9000.0)], 10)
    assert [c.rank for c in kept] == [(3,), (1,)]
