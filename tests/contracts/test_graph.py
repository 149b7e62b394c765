"""What every frontend must do: passes.graph.Graph, for each implementation of it.

Each one builds the same network: conv3x3 -> affine -> identity -> relu -> conv1x1 -> conv1x1, and dead code beside it.
The second convolution's bias is zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from passes.core.reference import relative_l2
from passes.core.site import Chain, Geometry, Site, Stage
from passes.fuse_pointwise import product_stage
from passes.fx_graph import FxGraph
from passes.graph import Graph
from passes.onnx_graph import OnnxGraph
from tests.onnx_models import normal, onnx_model
from tests.sequential_graph import SequentialGraph, Step

W1, B1 = normal(6, 3, 3, 3), normal(6)
W2, B2, W3, B3 = normal(16, 6, 1, 1), np.zeros(16, np.float32), normal(5, 16, 1, 1), normal(5)
SCALE, SHIFT = np.abs(normal(6, seed=1)) + 0.5, normal(6, seed=2)
SHAPE = (2, 3, 7, 7)
TOLERANCE = 1e-6  # float32 implementations round; the float64 one is far below


def onnx_graph() -> Graph:
    body = """net (float[2,3,7,7] x) => (float[2,5,4,4] y) {
        t1 = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1, b1)
        t2 = BatchNormalization (t1, scale, shift, zero, one)
        t3 = Identity (t2)
        t4 = Relu (t3)
        t5 = Conv (t4, w2, b2)
        y = Conv (t5, w3, b3)
        dead = Exp (y)
    }"""
    epsilon = 1e-5
    weights = {
        "w1": W1,
        "b1": B1,
        "scale": SCALE,
        "shift": SHIFT,
        "zero": np.zeros(6, np.float32),
        "one": np.full(6, 1 - epsilon, np.float32),
        "w2": W2,
        "b2": B2,
        "w3": W3,
        "b3": B3,
    }
    return OnnxGraph.from_model(onnx_model(body, weights))


def sequential_graph() -> Graph:
    return SequentialGraph(
        [
            Step("conv1", "Layer", Stage(W1, B1, Geometry((3, 3), (2, 2), pads=(1, 1, 1, 1)))),
            Step("bn", "Affine", scale=SCALE.astype(np.float64), shift=SHIFT.astype(np.float64)),
            Step("nothing", "Identity"),
            Step("relu", "Relu"),
            Step("conv2", "Layer", Stage(W2, B2, Geometry((1, 1)))),
            Step("conv3", "Layer", Stage(W3, B3, Geometry((1, 1)))),
            Step("dead", "Dead"),
        ],
        SHAPE,
    )


class TorchNetwork(nn.Module):
    """``nothing``: a module that passes its input on."""

    def __init__(self, nothing: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.nothing = nothing
        self.conv2, self.conv3 = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 5, 1)
        values = {
            **{"conv1.weight": W1, "conv1.bias": B1, "conv2.weight": W2, "conv2.bias": B2},
            **{"conv3.weight": W3, "conv3.bias": B3, "bn.weight": SCALE, "bn.bias": SHIFT},
            "bn.running_var": np.full(6, 1 - 1e-5, np.float32),
        }
        self.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, strict=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv3(self.conv2(torch.relu(self.nothing(self.bn(self.conv1(x))))))
        torch.exp(y)
        return y


def fx_graph() -> Graph:
    return FxGraph.trace(TorchNetwork(nn.Identity()), torch.zeros(SHAPE))


@cache
def exported() -> bytes:
    """The network as a .pt2 file; an nn.Identity would leave no trace in it."""
    program = torch.export.export(TorchNetwork(nn.Dropout(0.5)).eval(), (torch.zeros(SHAPE),))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt2"
        torch.export.save(program, path)
        return path.read_bytes()


def pt2_graph() -> Graph:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt2"
        path.write_bytes(exported())
        return FxGraph.read(path)


FRONTENDS = [onnx_graph, sequential_graph, fx_graph, pt2_graph]


@pytest.fixture(params=FRONTENDS)
def graph(request: pytest.FixtureRequest) -> Graph:
    return request.param()


def feeds(graph: Graph) -> dict[str, Any]:
    (spec,) = graph.inputs
    return {spec.name: normal(*SHAPE, seed=9).astype(spec.dtype)}


def svd_chain(site: Site) -> Chain:
    """The layer as a chain of full rank: itself without bias, then a 1x1 rotation and its inverse undone."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((site.stage.out_channels,) * 2))[0]
    turned = site.stage.affine(np.ones(len(q)), np.zeros(len(q)))
    weight = np.tensordot(q, turned.weight.astype(np.float64), axes=1).astype(np.float32)
    first = Stage(weight, None, site.stage.geometry)
    back = q.T.astype(np.float32).reshape(*q.shape, *(1,) * site.stage.geometry.ndim)
    return Chain((first, Stage(back, site.stage.bias, Geometry.pointwise(site.stage.geometry.ndim))), "rotated", (6,))


def replace_first(graph: Graph) -> None:
    site = graph.sites().sites[0]
    graph.replace(site, svd_chain(site))


def fold_first(graph: Graph) -> None:
    (affine,) = graph.affines()
    graph.fold(affine, affine.site.stage.affine(affine.scale, affine.shift))


def merge_first(graph: Graph) -> None:
    ((first, second),) = graph.adjacent()
    graph.merge(first, second, product_stage(first.stage, second.stage))


CHANGES = [
    replace_first,
    fold_first,
    merge_first,
    lambda graph: graph.drop_identities(),
    lambda graph: graph.drop_dead_code(),
]


def test_the_same_network_gives_the_same_sites_and_values(graph: Graph) -> None:
    reference = sequential_graph()
    for site, expected in zip(graph.sites().sites, reference.sites().sites, strict=True):
        np.testing.assert_array_equal(site.stage.weight, expected.stage.weight)
        assert site.stage.geometry == expected.stage.geometry
        assert (site.stage.bias is None) == (expected.stage.bias is None)
        assert (site.input_shape, site.output_shape) == (expected.input_shape, expected.output_shape)
        assert site.channel_axis == 1 and not site.in_body
    found = graph.run(feeds(graph))
    expected_values = reference.run({"x": feeds(graph)[graph.inputs[0].name]})
    assert relative_l2(found[0], expected_values[0]) < TOLERANCE


def test_site_names_are_unique(graph: Graph) -> None:
    names = [site.name for site in graph.sites().sites]
    assert len(set(names)) == len(names) == 3


def test_affines_come_with_their_scale_and_shift(graph: Graph) -> None:
    (affine,) = graph.affines()
    assert affine.site.name == graph.sites().sites[0].name
    np.testing.assert_allclose(affine.scale, SCALE, rtol=1e-6)
    np.testing.assert_allclose(affine.shift, SHIFT, rtol=1e-6)
    assert affine.scale.dtype == affine.shift.dtype == np.float64


def test_adjacent_sites_have_nothing_between_them(graph: Graph) -> None:
    ((first, second),) = graph.adjacent()
    assert first.output == second.input
    assert [first.name, second.name] == [site.name for site in graph.sites().sites[1:]]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_keeps_inputs_outputs_and_values(graph: Graph, change: Callable[[Graph], None]) -> None:
    inputs, outputs, text = graph.inputs, graph.outputs, graph.to_text()
    reference = graph.run(feeds(graph))
    change(graph)
    graph.check()
    assert (graph.inputs, graph.outputs) == (inputs, outputs)
    assert graph.to_text() != text
    (found,) = graph.run(feeds(graph))
    assert found.dtype == reference[0].dtype and relative_l2(found, reference[0]) < TOLERANCE


@pytest.mark.parametrize("change", CHANGES)
def test_a_clone_is_independent(graph: Graph, change: Callable[[Graph], None]) -> None:
    text = graph.to_text()
    clone = graph.clone()
    assert clone.to_text() == text
    change(clone)
    assert graph.to_text() == text
    other = graph.clone()
    change(other)
    assert other.to_text() == clone.to_text(), "the same change gives the same network"


def test_new_nodes_are_named_after_the_site(graph: Graph) -> None:
    site = graph.sites().sites[0]
    before = {s.name for s in graph.sites().sites}
    graph.replace(site, svd_chain(site))
    new = [s for s in graph.sites().sites if s.name not in before]
    assert len(new) == 2 and all(s.name.startswith(site.name) for s in new)
    assert (new[0].input, new[1].output) == (site.input, site.output)
    assert site.name not in {s.name for s in graph.sites().sites}


def test_folding_and_merging_use_up_what_they_worked_on(graph: Graph) -> None:
    fold_first(graph)
    assert graph.affines() == ()
    merge_first(graph)
    assert graph.adjacent() == ()
    assert len(graph.sites().sites) == 2


def test_what_is_dropped_is_named_once(graph: Graph) -> None:
    for drop in ("drop_identities", "drop_dead_code"):
        notes = getattr(graph, drop)()
        assert len(notes) == 1 and notes[0].reason
        assert getattr(graph, drop)() == ()


def test_the_listing_tells_the_smallest_change_of_a_weight(graph: Graph) -> None:
    text = graph.to_text()
    assert graph.to_text() == text
    site = graph.sites().sites[0]
    weight = site.stage.weight.copy()
    weight.flat[0] = np.nextafter(weight.flat[0], np.inf)
    same, changed = graph.clone(), graph.clone()
    same.replace(site, Chain((site.stage,)))
    changed.replace(site, Chain((replace(site.stage, weight=weight),)))
    assert changed.to_text() != same.to_text()


def test_the_workload_agrees_with_the_sites(graph: Graph) -> None:
    works = {op.name: op for op in graph.workload()}
    for site in graph.sites().sites:
        op = works[site.name]
        assert op.stage is not None
        positions = prod(site.output_shape[2:]) * site.batch
        assert op.stage.macs == site.stage.macs(positions)
        assert op.input_shapes == (site.input_shape,) and op.output_shapes == (site.output_shape,)
        assert op.inputs == (site.input,) and op.outputs == (site.output,)
        assert op.weight_params == site.stage.params
    assert [op.name for op in works.values() if op.stage] == [site.name for site in graph.sites().sites]
