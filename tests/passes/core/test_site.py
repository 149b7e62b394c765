from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from passes.core.cost import StageWork, chain_work
from passes.core.factor import FactorFormat
from passes.core.formats import FORMATS
from passes.core.patches import positions
from passes.core.reference import apply_chain, apply_stage
from passes.core.site import Chain, Geometry, Site, Stage, compose
from tests.passes.core.layers import Array, layers, torch_reference


def random_chain(format: FactorFormat, stage: Stage, rank: tuple[int, ...], rng: np.random.Generator) -> Chain:
    """Stages of random weights in the shapes of the format's chain."""
    groups = stage.geometry.groups
    ins = (stage.in_channels // groups, *format.widths(rank))
    outs = (*format.widths(rank), stage.out_channels // groups)
    stages = [
        Stage(rng.standard_normal((groups * o, i, *g.kernel)), None, g)
        for g, i, o in zip(format.geometries(stage.geometry), ins, outs, strict=True)
    ]
    return Chain((*stages[:-1], replace(stages[-1], bias=stage.bias)))


@pytest.mark.parametrize("name", FORMATS)
@given(layer=layers(), draw=st.data())
def test_the_composed_weight_does_what_the_stages_do(
    name: str, layer: tuple[Stage, Array], draw: st.DataObject
) -> None:
    stage, x = layer
    format = FORMATS[name]
    full = format.full_rank(stage)
    assume(full is not None)
    rank = tuple(draw.draw(st.integers(1, r)) for r in full)
    chain = random_chain(format, stage, rank, np.random.default_rng(0))
    composed = compose(chain.stages)
    assert composed.shape == stage.grouped_weight().shape
    whole = Stage(composed.reshape(stage.weight.shape), stage.bias, stage.geometry)
    np.testing.assert_allclose(apply_chain(chain, x), torch_reference(whole, x), rtol=1e-9, atol=1e-9)


def test_stages_with_different_groups_do_not_compose() -> None:
    with pytest.raises(ValueError, match="groups"):
        compose((Stage(np.ones((4, 2)), None, Geometry(groups=2)), Stage(np.ones((4, 4)), None)))


def counted_macs(stage: Stage, x: Array) -> int:
    with FlopCounterMode(display=False) as counter:
        torch_reference(stage, x)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@given(layer=layers())
def test_macs_are_half_of_torchs_flops(layer: tuple[Stage, Array]) -> None:
    stage, x = layer
    g = stage.geometry
    wanted = counted_macs(stage, x)
    spatial = x.shape[2:]
    work = StageWork(g, stage.in_channels, stage.out_channels, spatial, len(x), stage.bias is not None)
    assert work.macs == wanted
    assert stage.macs(len(x) * prod(spatial if g.transposed else g.output_spatial(spatial))) == wanted
    assert work.weights == stage.weight.size


@pytest.mark.parametrize(
    ("geometry", "outs", "ins", "shape", "macs"),
    [
        (Geometry((3, 3), (2, 2), pads=(1, 1, 1, 1)), 16, 8, (1, 8, 10, 10), 5 * 5 * 16 * 8 * 9),
        (Geometry((3, 3), groups=4), 16, 2, (1, 8, 10, 10), 8 * 8 * 16 * 2 * 9),
        (Geometry((3, 3), groups=8), 8, 1, (1, 8, 10, 10), 8 * 8 * 8 * 9),
        (Geometry((4, 4), (2, 2), pads=(1, 1, 1, 1), transposed=True), 16, 8, (1, 8, 10, 10), 100 * 16 * 8 * 16),
        (Geometry(), 10, 7, (5, 7), 5 * 10 * 7),
    ],
    ids=["conv", "grouped", "depthwise", "transposed", "linear"],
)
def test_macs_written_out(geometry: Geometry, outs: int, ins: int, shape: tuple[int, ...], macs: int) -> None:
    work = StageWork(geometry, ins * geometry.groups, outs, shape[2:], shape[0])
    assert work.macs == macs
    assert counted_macs(Stage(np.ones((outs, ins, *geometry.kernel)), None, geometry), np.ones(shape)) == macs


def test_the_work_of_a_chain_adds_up_to_torchs_count() -> None:
    stage = Stage(np.ones((8, 6, 3, 3)), np.ones(8), Geometry((3, 3), (2, 1), pads=(1, 1, 1, 1)))
    chain = random_chain(FORMATS["tucker2"], stage, (2, 3), np.random.default_rng(0))
    x = np.ones((2, 6, 9, 9))
    site = Site("s", "Conv", stage, "x", "y", x.shape, (2, 8, 5, 9), 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = x
        for part in chain.stages:
            y = torch_reference(part, y)
    works = chain_work(chain, site)
    assert 2 * sum(work.macs for work in works) == counter.get_total_flops()
    assert [work.bias for work in works] == [False, False, True]


@given(layer=layers(), seed=st.integers(0, 99))
def test_affine_scales_and_shifts_the_output(layer: tuple[Stage, Array], seed: int) -> None:
    stage, x = layer
    rng = np.random.default_rng(seed)
    scale, shift = rng.standard_normal((2, stage.out_channels))
    wide = (1, -1, *(1,) * stage.geometry.ndim)
    wanted = torch_reference(stage, x) * scale.reshape(wide) + shift.reshape(wide)
    np.testing.assert_allclose(apply_stage(stage.affine(scale, shift), x), wanted, rtol=1e-10, atol=1e-10)


@given(layer=layers())
def test_pointwise_means_that_positions_do_not_meet(layer: tuple[Stage, Array]) -> None:
    stage, x = layer
    assume(stage.geometry.is_pointwise)
    assert positions(stage.geometry, x.shape) == (x.shape[0], *x.shape[2:])
    moved = x.copy()
    moved[(0, slice(None), *(0,) * stage.geometry.ndim)] += 1
    changed = (torch_reference(stage, moved) != torch_reference(stage, x)).any(axis=1)
    changed[(0, *(0,) * stage.geometry.ndim)] = False
    assert not changed.any()


@pytest.mark.parametrize("name", ["strides", "dilations", "pads", "output_padding"])
def test_a_geometry_of_the_wrong_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Geometry((3, 3), **{name: (1,)})


@pytest.mark.parametrize(
    ("weight", "bias", "geometry", "message"),
    [
        (np.ones((4, 4, 3)), None, Geometry((3, 3)), "does not fit a kernel"),
        (np.ones((4, 4, 3, 3)), None, Geometry((3, 2)), "does not fit a kernel"),
        (np.ones((5, 4)), None, Geometry(groups=2), "groups"),
        (np.ones((5, 4)), np.ones(4), Geometry(), "bias"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    weight: Array, bias: Array | None, geometry: Geometry, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(weight, bias, geometry)


def test_a_chain_whose_channels_do_not_meet_is_refused() -> None:
    with pytest.raises(ValueError, match="gives 3 channels, the next takes 4"):
        Chain((Stage(np.ones((3, 5)), None), Stage(np.ones((2, 4)), None)))
