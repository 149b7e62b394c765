"""The supernet layer: nested slices of one decomposition, mixed in one convolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.core.fit import FitProblem
from passes.core.moments import Moments, Samples
from passes.core.patches import outputs_at, patches, sample_rows
from passes.core.site import Chain, Geometry, Stage, compose
from passes.ranks.context import SiteFactors
from passes.ranks.problem import Option
from passes.registry import FORMATS
from passes.torch_apply import apply_stage
from passes.training.haloc_supernet import SharedFactors, SupernetLayer, _then

CONV = Geometry((3, 3), (2, 1), (1, 2), (1, 2, 1, 0))


def conv(geometry: Geometry = CONV, channels: int = 6, out: int = 8, seed: int = 0) -> Stage:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out, channels // geometry.groups, *geometry.kernel)).astype(np.float32)
    return Stage(weight, rng.standard_normal(out).astype(np.float32), geometry)


def factors(stage: Stage, format: str) -> SiteFactors:
    problem = FitProblem(stage.grouped_weight().astype(np.float64))
    return SiteFactors(FORMATS.load(format).decompose(stage.geometry, problem), stage.bias)


def supernet(stage: Stage, ranks: dict[str, list[tuple[int, ...]]]) -> tuple[SupernetLayer, list[Option]]:
    options = [Option("dense", (), {}, 0.0)]
    options += [Option(name, rank, {}, 0.0) for name, each in ranks.items() for rank in each]
    formats = {name: FORMATS.load(name) for name in ranks}
    return SupernetLayer(stage, 1, options, formats, {name: factors(stage, name) for name in ranks}), options


def one_hot(count: int, index: int) -> torch.Tensor:
    gate = torch.zeros(count)
    gate[index] = 1.0
    return gate


RANKS: dict[str, list[tuple[int, ...]]] = {
    "channel_svd_out": [(7,), (3,), (1,)],
    "channel_svd_in": [(5,), (2,)],
    "spatial_svd_vh": [(9,), (4,)],
    "spatial_svd_hv": [(6,)],
    "tucker2": [(6, 3), (2, 8), (4, 4)],
}


@pytest.mark.parametrize(
    "geometry",
    [CONV, Geometry((3, 3), groups=2, pads=(1, 1, 1, 1)), Geometry((3, 3), (2, 2), pads=(1,) * 4, transposed=True)],
    ids=["strided", "grouped", "transposed"],
)
def test_each_candidate_is_the_formats_own_slice(geometry: Geometry) -> None:
    """The reference runs the chain of the format's slice, stage by stage."""
    stage = conv(geometry)
    full = {name: FORMATS.load(name).full_rank(stage) for name in RANKS}
    ranks = {
        name: [tuple(min(r, f) for r, f in zip(rank, full[name] or (), strict=True)) for rank in each]
        for name, each in RANKS.items()
    }
    layer, options = supernet(stage, ranks)
    x = torch.randn(2, 6, 9, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for index, option in enumerate(options):
            layer.gate = one_hot(len(options), index)
            if option.format == "dense":
                wanted = apply_stage(stage, x)
            else:
                wanted = x
                slices = factors(stage, option.format).decomposition.stages(option.rank)
                for part in Chain(slices).stages:
                    wanted = apply_stage(part, wanted)
                wanted = wanted + torch.tensor(stage.bias).reshape(1, -1, 1, 1)
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_linear_layer_keeps_its_channels_on_its_own_axis() -> None:
    rng = np.random.default_rng(0)
    stage = Stage(rng.standard_normal((4, 5)).astype(np.float32), None)
    options = [Option("dense", (), {}, 0.0), Option("svd", (2,), {}, 0.0)]
    layer = SupernetLayer(stage, -2, options, {"svd": FORMATS.load("svd")}, {"svd": factors(stage, "svd")})
    x = rng.standard_normal((3, 5, 7)).astype(np.float32)
    u, s, vt = np.linalg.svd(stage.weight.astype(np.float64))
    for gate, weight in ((one_hot(2, 0), stage.weight), (one_hot(2, 1), (u[:, :2] * s[:2]) @ vt[:2])):
        layer.gate = gate
        with torch.no_grad():
            found = layer(torch.tensor(x)).numpy()
        np.testing.assert_allclose(found, np.einsum("oi,nit->not", weight, x), rtol=1e-4, atol=1e-5)


def test_a_mixture_of_candidates_gives_the_mixture_of_their_outputs() -> None:
    layer, options = supernet(conv(), RANKS)
    x = torch.randn(2, 6, 9, 10, generator=torch.Generator().manual_seed(1))
    shares = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(len(options))), dtype=torch.float32)
    with torch.no_grad():
        wanted = torch.zeros(())
        for index, share in enumerate(shares):
            layer.gate = one_hot(len(options), index)
            wanted = wanted + share * layer(x)
        layer.gate = shares
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_every_gate_gets_the_gradient_of_its_candidate() -> None:
    """d loss / d gate_k of a loss <y, c> is <y_k, c>, y_k being what candidate k alone gives."""
    layer, options = supernet(conv(), RANKS)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 9, 10, generator=draw)
    layer.gate = one_hot(len(options), 3).requires_grad_()
    y = layer(x)
    c = torch.randn(y.shape, generator=draw)
    (found,) = torch.autograd.grad((y * c).sum(), [layer.gate])
    with torch.no_grad():
        wanted = []
        for index in range(len(options)):
            layer.gate = one_hot(len(options), index)
            wanted.append(float((layer(x) * c).sum()))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_a_small_rank_leaves_the_rest_of_the_factors_alone() -> None:
    """So that it can grow again: what a small rank does not use gets no gradient."""
    layer, options = supernet(conv(), {"channel_svd_out": [(7,), (2,)]})
    layer.gate = one_hot(len(options), 2)
    x = torch.randn(2, 6, 9, 10, generator=torch.Generator().manual_seed(1))
    layer(x).square().sum().backward()
    inner, outer = (p.grad for p in layer.shared.parameters())
    assert inner is not None and outer is not None
    assert float(inner[:, :2].abs().min()) > 0 and float(outer[:, :, :2].abs().min()) > 0
    assert not inner[:, 2:].any() and not outer[:, :, 2:].any()
    assert layer.weight.grad is None, "the dense weight is beside them"


def test_the_bias_makes_up_for_the_lost_mean() -> None:
    """On inputs of a mean far from zero, each candidate's mean output is the layer's, as the moments have it."""
    geometry = Geometry((3, 3))
    stage = conv(geometry)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 6, 8, 8)) + 5.0
    rows = sample_rows(geometry, x.shape, 10**6, rng)
    y = apply_stage(stage, torch.tensor(x)).numpy()
    moments = Moments.of(Samples(patches(x, geometry, rows)), outputs_at(y, 1, rows))
    problem = FitProblem(stage.grouped_weight().astype(np.float64), moments.ridge(1e-3))
    made = SiteFactors(FORMATS.load("tucker2").decompose(geometry, problem), stage.bias, moments.mean_x, moments.mean_t)
    for rank in ((2, 2), (5, 3)):
        weight = compose(made.decomposition.stages(rank)).reshape(stage.weight.shape)
        out = apply_stage(Stage(weight, made.bias_at(rank), geometry), torch.tensor(x)).numpy()
        np.testing.assert_allclose(out.mean(axis=(0, 2, 3)), y.mean(axis=(0, 2, 3)), rtol=1e-6)
    assert SiteFactors(made.decomposition, None).bias_at((2, 2)) is None


def test_factors_whose_kernels_overlap_compose_as_stages_do() -> None:
    """No format of rankc has such; one of another distribution may."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((2, 3, 4, 3, 2))
    second = rng.standard_normal((2, 5, 3, 2, 3))
    stages = (
        Stage(first.reshape(6, 4, 3, 2), None, Geometry((3, 2), groups=2)),
        Stage(second.reshape(10, 3, 2, 3), None, Geometry((2, 3), groups=2)),
    )
    np.testing.assert_allclose(_then(torch.tensor(first), torch.tensor(second)).numpy(), compose(stages), rtol=1e-10)


def test_a_format_with_more_places_than_a_mask_serves_is_mixed_slice_by_slice() -> None:
    """Three ranks in a chain of four pointwise stages: the reference composes each slice with NumPy."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in ((1, 4, 5), (1, 3, 4), (1, 4, 3), (1, 6, 4))]

    class Four:
        name = "four"
        full_rank = (4, 3, 4)

        def widths(self, rank: tuple[int, ...]) -> tuple[int, ...]:
            return rank

        def stages(self, rank: tuple[int, ...]) -> tuple[Stage, ...]:
            outs, ins = (*rank, 6), (5, *rank)
            return tuple(Stage(w[0, :o, :i], None) for w, o, i in zip(weights, outs, ins, strict=True))

    four = Four()
    ranks = [(4, 3, 2), (2, 2, 4)]
    shared = SharedFactors(four, ranks, SiteFactors(four))  # type: ignore[arg-type]
    gates = torch.tensor([0.25, 0.75])
    wanted = sum(float(g) * compose(four.stages(rank)) for g, rank in zip(gates, ranks, strict=True))
    with torch.no_grad():
        np.testing.assert_allclose(shared(gates).numpy(), wanted, rtol=1e-4, atol=1e-5)
