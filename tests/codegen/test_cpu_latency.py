"""Prices of a tuned target with a made-up processor: measured where trials are, learned elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegen.cpu_latency import CALL_S, CpuLatency
from codegen.events import QuietEvents
from codegen.measurable import MeasurablePrices
from passes.core.cost import Kind, OpWork, StageWork
from passes.core.site import Geometry
from passes.onnx_graph import OnnxGraph
from tests.codegen.made_up_trials import DEVICE, MadeUpTrials

DIGITS = Path(__file__).parents[2] / "examples" / "digits.onnx"
CONV = StageWork(Geometry((3, 3), pads=(1, 1, 1, 1)), 16, 32, (16, 16))
POINT = StageWork(Geometry((1, 1)), 32, 8, (16, 16), bias=False)


def truth_s(work: StageWork) -> float:
    return 2 * work.macs / 80e9 + 2e-7 * work.out_channels + 5e-7


def test_it_is_a_price_list_that_can_be_measured() -> None:
    assert isinstance(CpuLatency(DEVICE, MadeUpTrials(truth_s)), MeasurablePrices)


def test_a_price_is_estimated_until_it_is_measured() -> None:
    prices = CpuLatency(DEVICE, MadeUpTrials(truth_s))
    (before,) = prices.chains([(CONV,)])
    assert before.kind is Kind.ESTIMATED and prices.spread([(CONV,)])[0] > 0
    assert prices.measure([CONV], QuietEvents())
    (after,) = prices.chains([(CONV,)])
    assert after.kind is Kind.MEASURED and after.latency == pytest.approx(truth_s(CONV) + CALL_S, rel=1e-12)
    assert prices.spread([(CONV,)]) == [0.0]
    assert not prices.measure([CONV], QuietEvents())


def test_stages_add_up_and_a_chain_is_as_sure_as_its_weakest_stage() -> None:
    prices = CpuLatency(DEVICE, MadeUpTrials(truth_s))
    prices.measure([CONV], QuietEvents())
    chain, first, second = prices.chains([(CONV, POINT), (CONV,), (POINT,)])
    assert chain.latency == pytest.approx(first.latency + second.latency, rel=1e-12)
    assert (first.kind, second.kind, chain.kind) == (Kind.MEASURED, Kind.ESTIMATED, Kind.ESTIMATED)
    assert chain.unit == "s" and chain.macs == CONV.macs + POINT.macs
    assert chain.params == 32 * 16 * 9 + 32 + 8 * 32  # one of the stages has a bias


def test_a_kernel_is_the_same_with_and_without_bias() -> None:
    trials = MadeUpTrials(truth_s)
    prices = CpuLatency(DEVICE, trials)
    prices.measure([CONV, StageWork(CONV.geometry, 16, 32, (16, 16), bias=False)], QuietEvents())
    assert [len(tried) for tried in trials.rounds] == [1]


def test_what_was_measured_moves_the_prices_of_the_rest() -> None:
    """The made-up processor is half as fast as the prior takes it to be: one kernel tells."""
    prices = CpuLatency(DEVICE, MadeUpTrials(truth_s))
    near = StageWork(CONV.geometry, 16, 28, (16, 16))
    (guessed,) = prices.chains([(near,)])
    prices.measure([CONV], QuietEvents())
    (learned,) = prices.chains([(near,)])
    truth = truth_s(near) + CALL_S
    assert abs(learned.latency - truth) < 0.25 * abs(guessed.latency - truth)


def test_the_outline_does_not_depend_on_what_was_measured() -> None:
    measured, fresh = CpuLatency(DEVICE, MadeUpTrials(truth_s)), CpuLatency(DEVICE, MadeUpTrials(truth_s))
    measured.measure([CONV], QuietEvents())
    works = [(CONV,), (CONV, POINT)]
    assert measured.outline().chains(works) == fresh.outline().chains(works)


def test_without_a_device_nothing_wants_to_be_measured() -> None:
    prices = CpuLatency(DEVICE, None)
    assert prices.wanting([CONV]) == [] and not prices.measure([CONV], QuietEvents())


def op(
    name: str, kind: str, reads: dict[str, tuple[int, ...]], shape: tuple[int, ...], stage: StageWork | None
) -> OpWork:
    return OpWork(name, kind, stage, tuple(reads.values()), (shape,), tuple(reads), (f"{name}.out",), 0, 0)


def test_what_stands_behind_a_layer_is_computed_in_its_loops() -> None:
    """conv, relu, add, pool: the sum costs the bytes of its other operand, the pool a call and its bytes."""
    before, after = (1, 16, 16, 16), (1, 32, 16, 16)
    ops = [
        op("conv", "Conv", {"x": before}, after, CONV),
        op("relu", "Relu", {"conv.out": after}, after, None),
        op("add", "Add", {"relu.out": after, "y": after}, after, None),
        op("flat", "Reshape", {"add.out": after}, (1, 8192), None),
        op("pool", "GlobalAveragePool", {"add.out": after}, (1, 32, 1, 1), None),
    ]
    prices = CpuLatency(DEVICE, MadeUpTrials(truth_s))
    prices.measure([CONV], QuietEvents())
    conv, relu, add, flat, pool = (cost.latency for cost in prices.layers(ops))
    assert conv == truth_s(CONV) + CALL_S and relu == flat == 0
    assert add == pytest.approx(4 * 8192 / 100e9, rel=1e-12)
    assert pool == pytest.approx(CALL_S + 4 * (8192 + 32) / 100e9, rel=1e-12)
    assert prices.network(ops).latency == pytest.approx(conv + add + pool, rel=1e-12)


def test_no_plan_is_below_the_floor_and_the_least_is_on_it() -> None:
    graph = OnnxGraph.read(DIGITS)
    ops = graph.workload()
    site = next(s for s in graph.sites().sites if s.stage.geometry.ndim)
    stage = next(o.stage for o in ops if o.name == site.name)
    assert stage is not None
    half = (
        StageWork(stage.geometry, stage.in_channels, 2, stage.spatial),
        StageWork(Geometry((1, 1)), 2, stage.out_channels, stage.output_spatial),
    )
    prices = CpuLatency(DEVICE, MadeUpTrials(truth_s))
    prices.measure([o.stage for o in ops if o.stage is not None], QuietEvents())
    floor = prices.floor(ops, {site.name: [(stage,), half]})
    dense, chain = prices.chains([(stage,), half])
    least = prices.network(ops).latency - dense.latency + min(dense.latency, chain.latency)
    assert floor.latency == pytest.approx(least, rel=1e-12)
