from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from passes.core.reference import apply_stage as plain
from passes.core.site import Chain, Geometry, Site, Stage
from passes.torch_apply import apply_stage, as_array, channels_second, restore, run_chain
from tests.passes.core.layers import Array, layers


@given(layer=layers())
def test_a_stage_on_tensors_is_the_stage_on_arrays(layer: tuple[Stage, Array]) -> None:
    stage, x = layer
    found = apply_stage(stage, torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), plain(stage, x), rtol=1e-10, atol=1e-10)


@given(layer=layers())
def test_other_weights_stand_in_for_the_stages_own_and_get_gradients(layer: tuple[Stage, Array]) -> None:
    stage, x = layer
    weight = torch.from_numpy(np.asarray(stage.weight) * 2).requires_grad_()
    bias = torch.arange(stage.out_channels, dtype=torch.float64).requires_grad_()
    found = apply_stage(stage, torch.from_numpy(x), weight, bias)
    wanted = plain(Stage(stage.weight * 2, np.arange(stage.out_channels, dtype=float), stage.geometry), x)
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-10, atol=1e-10)
    weight_gradient, bias_gradient = torch.autograd.grad(found.sum(), [weight, bias])
    # d sum(y) / d bias counts the outputs of a channel; sum(y) is linear in the weights
    np.testing.assert_allclose(bias_gradient.numpy(), found[:, 0].numel(), rtol=1e-12)
    linear = ((weight_gradient * weight).sum() + (bias_gradient * bias).sum()).item()
    assert linear == pytest.approx(found.sum().item(), rel=1e-9, abs=1e-9)


LAYOUTS = [((4, 5), -1), ((2, 3, 5), -1), ((5, 4), -2), ((2, 5, 4), -2), ((2, 3, 5, 4), -2)]


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_a_linear_chain_runs_along_the_axis_of_its_site(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((7, 5)), rng.standard_normal(7)
    x = rng.standard_normal(shape)
    wanted = np.moveaxis(np.moveaxis(x, axis, -1) @ weight.T + bias, -1, axis)
    site = Site("s", "MatMul", Stage(weight, bias), "x", "y", shape, wanted.shape, axis)
    halves = Chain((Stage(np.eye(5), None), Stage(weight, bias)))
    for chain in (Chain((site.stage,)), halves):
        found = run_chain(site, chain, torch.from_numpy(x))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)
    rows = channels_second(site, torch.from_numpy(x))
    assert rows.shape == (x.size // 5, 5)
    assert torch.equal(restore(site, rows, torch.from_numpy(x)), torch.from_numpy(x))
    np.testing.assert_array_equal(as_array(site, torch.from_numpy(x)), np.moveaxis(x, axis, -1).reshape(-1, 5))


def test_a_convolution_keeps_its_layout() -> None:
    stage = Stage(np.ones((3, 2, 1, 1)), None, Geometry((1, 1)))
    x = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    site = Site("s", "Conv", stage, "x", "y", (2, 2, 4, 5), (2, 3, 4, 5), 1)
    assert channels_second(site, x) is x
    assert run_chain(site, Chain((stage,)), x).shape == (2, 3, 4, 5)
