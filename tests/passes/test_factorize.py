from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from passes.core.factor import chain_of
from passes.core.fit import FitProblem
from passes.core.site import Chain, Geometry, Site, Stage
from passes.errors import InputError
from passes.factorize import Factorize
from passes.onnx_graph import OnnxGraph
from passes.registry import FORMATS
from tests.onnx_models import normal, onnx_model
from tests.pass_harness import check_pass

BODY = """net (float[2,8,6,6] x) => (float[2,10,3,3] y) {
    t = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)
    y = Relu (t)
}"""
FEEDS = {"x": normal(2, 8, 6, 6, seed=4)}


def network() -> OnnxGraph:
    return OnnxGraph.from_model(onnx_model(BODY, {"w": normal(10, 8, 3, 3), "b": normal(10)}))


def full_chain(site: Site, name: str) -> Chain:
    """The chain of full rank, which is exact."""
    format = FORMATS.load(name)
    decomposition = format.decompose(site.stage.geometry, FitProblem(site.stage.grouped_weight().astype(np.float64)))
    rank = decomposition.full_rank
    return chain_of(name, rank, decomposition.stages(rank), site.stage.bias)


@pytest.mark.parametrize(
    ("name", "stages"), [("channel_svd_out", 2), ("channel_svd_in", 2), ("spatial_svd_vh", 2), ("tucker2", 3)]
)
def test_a_chain_of_full_rank_changes_operators_and_not_values(name: str, stages: int) -> None:
    graph = network()
    (site,) = graph.sites().sites
    step = Factorize({site.name: full_chain(site, name)})
    result = check_pass(
        step, graph, FEEDS, before={"Conv": 1, "Relu": 1}, after={"Conv": stages, "Relu": 1}, tolerance=1e-5
    )
    (note,) = result.notes
    assert note.node == site.name and note.reason.startswith(f"{name} of rank ")


def test_the_note_says_what_became_of_the_parameters() -> None:
    graph = network()
    (site,) = graph.sites().sites
    chain = Chain(
        (
            Stage(normal(3, 8, 3, 3), None, site.stage.geometry),
            Stage(normal(10, 3, 1, 1), site.stage.bias, Geometry.pointwise(2)),
        ),
        "channel_svd_out",
        (3,),
    )
    (note,) = Factorize({site.name: chain}).run(graph).notes
    # 10*8*9 + 10 = 730 and 3*8*9 + 10*3 + 10 = 256
    assert note.reason == "channel_svd_out of rank 3: 2 stages, 730 parameters became 256"


def test_the_layer_itself_is_no_change() -> None:
    graph = network()
    (site,) = graph.sites().sites
    counts = {"Conv": 1, "Relu": 1}
    result = check_pass(
        Factorize({site.name: Chain((site.stage,))}), graph, FEEDS, before=counts, after=counts, tolerance=0.0
    )
    assert [note.reason for note in result.notes] == ["kept: the chain is the layer itself"]


def test_a_dense_layer_with_other_weights_is_replaced() -> None:
    graph = network()
    (site,) = graph.sites().sites
    reference = graph.run(FEEDS)[0]
    doubled = replace(site.stage, weight=site.stage.weight * 2, bias=site.stage.bias * 2)
    assert Factorize({site.name: Chain((doubled,))}).run(graph).modified
    np.testing.assert_allclose(graph.run(FEEDS)[0], 2 * reference, rtol=1e-6)


def test_a_site_that_is_not_there_is_noted() -> None:
    graph = network()
    (site,) = graph.sites().sites
    result = Factorize({"elsewhere": Chain((site.stage,))}).run(graph)
    assert not result.modified
    assert [(note.node, note.reason) for note in result.notes] == [("elsewhere", "no such site in this network")]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            Stage(normal(10, 4, 3, 3), None, Geometry((3, 3), (2, 2), pads=(1, 1, 1, 1))),
            "maps 4 to 10 channels, the layer 8 to 10",
        ),
        (Stage(normal(10, 8, 3, 3), None, Geometry((3, 3))), r"gives a spatial size of \(4, 4\), the layer \(3, 3\)"),
    ],
)
def test_a_chain_of_another_network_is_refused_before_anything_changes(stage: Stage, message: str) -> None:
    graph = network()
    (site,) = graph.sites().sites
    text = graph.to_text()
    with pytest.raises(InputError, match=message):
        Factorize({site.name: Chain((stage,))}).run(graph)
    assert graph.to_text() == text
