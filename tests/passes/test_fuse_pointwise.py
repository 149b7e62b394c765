from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.core.cost import Cost, OpWork, StageWork, additive_floor
from passes.core.reference import apply_stage, relative_l2
from passes.core.site import Geometry, Site, Stage
from passes.fuse_pointwise import FusePointwise, product_stage, refusal
from passes.onnx_graph import OnnxGraph
from tests.onnx_models import normal, onnx_model
from tests.pass_harness import check_pass
from tests.sequential_graph import SequentialGraph, Step


def random_stage(rng: np.random.Generator, geometry: Geometry, i: int, o: int, bias: bool) -> Stage:
    weight = rng.standard_normal((o, i // geometry.groups, *geometry.kernel))
    return Stage(weight, rng.standard_normal(o) if bias else None, geometry)


def pair(first: Stage, second: Stage, spatial: tuple[int, ...]) -> tuple[Site, Site]:
    graph = SequentialGraph([Step("a", "Layer", first), Step("b", "Layer", second)], (2, first.in_channels, *spatial))
    ((a, b),) = graph.adjacent()
    return a, b


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Stage, Stage, tuple[int, ...]]:
    """A pointwise stage and any other one, in either order, 0 to 2 axes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ndim, groups = draw(st.integers(0, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    axis = st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim).map(tuple)
    transposed = ndim > 0 and draw(st.booleans())
    pads = tuple(draw(st.lists(st.integers(0, 1), min_size=2 * ndim, max_size=2 * ndim)))
    other = Geometry(draw(axis), draw(axis), draw(axis), pads, groups, transposed)
    order = [Geometry.pointwise(ndim, groups), other]
    if draw(st.booleans()):
        order.reverse()
    widths = [groups * draw(st.integers(1, 3)) for _ in range(3)]
    biases = draw(st.tuples(st.booleans(), st.booleans()))
    stages = [random_stage(rng, g, i, o, b) for g, i, o, b in zip(order, widths, widths[1:], biases, strict=False)]
    return stages[0], stages[1], (7,) * ndim


@given(pairs())
def test_the_product_is_exact_wherever_it_is_not_refused(case: tuple[Stage, Stage, tuple[int, ...]]) -> None:
    first, second, spatial = case
    reason = refusal(*pair(first, second, spatial))
    x = np.random.default_rng(1).standard_normal((2, first.in_channels, *spatial))
    expected = apply_stage(second, apply_stage(first, x))
    found = apply_stage(product_stage(first, second), x)
    if not reason:
        assert relative_l2(found, expected) < 1e-12
    else:  # the only refusal that these pairs can meet, and it is one for a reason
        assert "does not reach the padding" in reason
        g = second.geometry
        assert first.bias is not None and (any(g.pads) or g.transposed)


def test_a_bias_before_padding_really_is_another_function() -> None:
    rng = np.random.default_rng(0)
    first = random_stage(rng, Geometry.pointwise(2), 3, 4, bias=True)
    second = random_stage(rng, Geometry((3, 3), pads=(1, 1, 1, 1)), 4, 5, bias=False)
    assert refusal(*pair(first, second, (6, 6))) == "the bias of a does not reach the padding"
    x = rng.standard_normal((1, 3, 6, 6))
    expected = apply_stage(second, apply_stage(first, x))
    found = apply_stage(product_stage(first, second), x)
    np.testing.assert_allclose(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-10)
    assert abs(found[..., 0, 0] - expected[..., 0, 0]).max() > 0.1


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (Geometry((3, 3)), Geometry((3, 3)), "neither is pointwise"),
        (Geometry.pointwise(2), Geometry((3, 3), groups=2), "they have 1 and 2 groups"),
        (Geometry((1, 1), strides=(2, 2)), Geometry((3, 3)), "neither is pointwise"),
    ],
)
def test_refusals(first: Geometry, second: Geometry, reason: str) -> None:
    rng = np.random.default_rng(0)
    stages = random_stage(rng, first, 4, 4, False), random_stage(rng, second, 4, 4, False)
    assert refusal(*pair(*stages, (8, 8))) == reason


def chain_of(widths: list[int], spatial: tuple[int, ...] = (4, 4), bias: bool = True) -> SequentialGraph:
    rng = np.random.default_rng(5)
    steps = [
        Step(f"conv{n}", "Layer", random_stage(rng, Geometry.pointwise(len(spatial)), i, o, bias))
        for n, (i, o) in enumerate(pairwise(widths))
    ]
    return SequentialGraph(steps, (2, widths[0], *spatial))


def test_a_row_of_layers_becomes_one_where_each_product_is_cheaper() -> None:
    # MACs per position: 8*32 + 32*8 = 512 -> 8*8 = 64, then 8*8 + 8*4 = 96 -> 8*4 = 32
    graph = chain_of([8, 32, 8, 4])
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 8, 4, 4))}
    result = check_pass(FusePointwise(), graph, feeds, before={"Layer": 3}, after={"Layer": 1}, tolerance=1e-12)
    assert len(result.notes) == 2
    assert sum(op.stage.macs for op in graph.workload() if op.stage) == 2 * 16 * 32


def test_a_low_rank_pair_stays() -> None:
    # 16*2 + 2*16 = 64 MACs per position against 256 for the product
    graph = chain_of([16, 2, 16])
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 16, 4, 4))}
    result = check_pass(FusePointwise(), graph, feeds, before={"Layer": 2}, after={"Layer": 2}, tolerance=0.0)
    assert [note.reason for note in result.notes] == ["not fused with conv0: macs would go from 2048 to 8192"]


@dataclass(frozen=True)
class PerStage:
    """Latency is a fixed price per stage: the model of a device that is bound by launches."""

    price: float = 10.0
    unit: str = "cycles"
    margin: float = 0.0
    granularity: int = 1

    def chains(self, works: Sequence[tuple[StageWork, ...]]) -> list[Cost]:
        return [Cost(self.price * len(work), self.unit, macs=sum(w.macs for w in work)) for work in works]

    def network(self, ops: Sequence[OpWork]) -> Cost:
        return Cost(self.price * len(ops), self.unit)

    def floor(self, ops: Sequence[OpWork], options: Mapping[str, Sequence[tuple[StageWork, ...]]]) -> Cost:
        return additive_floor(self, ops, options)


def test_the_latency_model_decides_when_there_is_one() -> None:
    graph = chain_of([16, 2, 16])
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 16, 4, 4))}
    check_pass(FusePointwise(PerStage()), graph, feeds, before={"Layer": 2}, after={"Layer": 1}, tolerance=1e-12)


def test_a_gain_within_the_margin_is_none() -> None:
    # one stage instead of two is a gain of 50 %
    for margin, merged in ((0.49, True), (0.51, False)):
        graph = chain_of([16, 2, 16])
        assert FusePointwise(PerStage(margin=margin)).run(graph).modified == merged


def test_no_other_budget_may_suffer() -> None:
    # fusing would raise the parameters from 2 * 16 * 2 + 2 + 16 to 16 * 16 + 16
    graph = chain_of([16, 2, 16])
    result = FusePointwise(PerStage(), metrics=("latency", "params")).run(graph)
    assert not result.modified
    assert [note.reason for note in result.notes] == ["not fused with conv0: params would rise from 82 to 272"]


def test_latency_cannot_be_judged_without_a_model() -> None:
    with pytest.raises(ValueError, match="latency cannot be judged"):
        FusePointwise(metrics=("latency",)).run(chain_of([4, 4, 4]))


def test_a_product_that_overflows_is_refused() -> None:
    big = np.full((4, 4), 1e30, np.float32)
    graph = SequentialGraph([Step("a", "Layer", Stage(big, None)), Step("b", "Layer", Stage(big, None))], (2, 4))
    result = FusePointwise().run(graph)
    assert not result.modified
    assert result.notes[0].reason == "not fused with a: their product overflows"


@pytest.mark.parametrize(
    ("body", "weights", "before", "after"),
    [
        pytest.param(
            "t = Conv (x, w, b)  y = Conv <pads = [1,1,1,1]> (t, v)",
            {"w": normal(32, 4, 1, 1), "b": np.zeros(32, np.float32), "v": normal(6, 32, 3, 3)},
            {"Conv": 2},
            {"Conv": 1},
            id="1x1 then padded 3x3, zero bias",
        ),
        pytest.param(
            "t = Conv (x, w, b)  y = Conv <pads = [1,1,1,1]> (t, v)",
            {"w": normal(32, 4, 1, 1), "b": normal(32), "v": normal(6, 32, 3, 3)},
            {"Conv": 2},
            {"Conv": 2},
            id="1x1 then padded 3x3, bias",
        ),
        pytest.param(
            "t = Conv <pads = [1,1,1,1], group = 2> (x, w, b)  y = Conv <group = 2> (t, v, c)",
            {"w": normal(32, 2, 3, 3), "b": normal(32), "v": normal(6, 16, 1, 1), "c": normal(6)},
            {"Conv": 2},
            {"Conv": 1},
            id="grouped 3x3 then 1x1",
        ),
        pytest.param(
            "t = Conv (x, w)  u = Relu (t)  y = Conv (u, v)",
            {"w": normal(32, 4, 1, 1), "v": normal(6, 32, 1, 1)},
            {"Conv": 2, "Relu": 1},
            {"Conv": 2, "Relu": 1},
            id="something between",
        ),
    ],
)
def test_convolutions_of_an_onnx_network(
    body: str, weights: dict[str, np.ndarray], before: dict[str, int], after: dict[str, int]
) -> None:
    graph = OnnxGraph.from_model(onnx_model(f"net (float[2,4,6,6] x) => (float[2,6,6,6] y) {{ {body} }}", weights))
    check_pass(FusePointwise(), graph, {"x": normal(2, 4, 6, 6, seed=3)}, before=before, after=after, tolerance=1e-6)


def test_linear_layers_of_an_onnx_network() -> None:
    body = """net (float[2,5,8] x) => (float[2,5,6] y) {
        s = MatMul (x, w)
        t = MatMul (s, v)
        y = Add (t, b)
    }"""
    graph = OnnxGraph.from_model(onnx_model(body, {"w": normal(8, 64), "v": normal(64, 6), "b": normal(6)}))
    before, after = {"MatMul": 2, "Add": 1}, {"MatMul": 1, "Add": 1}
    check_pass(FusePointwise(), graph, {"x": normal(2, 5, 8, seed=3)}, before=before, after=after, tolerance=1e-6)


def test_a_row_of_three_in_an_onnx_network() -> None:
    body = """net (float[3,8] x) => (float[3,4] y) {
        s = Gemm (x, u, a)
        t = Gemm (s, v, b)
        y = Gemm (t, w, c)
    }"""
    weights = {"u": normal(8, 64), "a": normal(64), "v": normal(64, 48), "b": normal(48), "w": normal(48, 4)}
    graph = OnnxGraph.from_model(onnx_model(body, {**weights, "c": normal(4)}))
    check_pass(FusePointwise(), graph, {"x": normal(3, 8)}, before={"Gemm": 3}, after={"Gemm": 1}, tolerance=1e-6)
