"""What every price list must do: passes.core.cost.LatencyModel, for each implementation of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest

from accel_sim.spec_file import load_spec, presets
from codegen.asic_latency import AsicLatency
from passes.core.cost import Cost, Kind, LatencyModel, OpWork, StageWork
from passes.core.site import Geometry

MODELS: dict[str, Callable[[], LatencyModel]] = {
    preset: lambda preset=preset: AsicLatency(load_spec(preset)) for preset in presets()
}

KERNEL = StageWork(Geometry((3, 3), pads=(1, 1, 1, 1)), 32, 48, (16, 16))
POINTWISE = StageWork(Geometry((1, 1)), 48, 64, (16, 16))
LINEAR = StageWork(Geometry(), 256, 100, (), batch=4)
GROUPED = StageWork(Geometry((3, 3), (2, 2), pads=(1, 1, 1, 1), groups=8), 32, 32, (15, 17))
TRANSPOSED = StageWork(Geometry((2, 2), (2, 2), transposed=True), 16, 24, (8, 8))
CHAINS = [(KERNEL,), (KERNEL, POINTWISE), (POINTWISE,), (LINEAR,), (GROUPED,), (TRANSPOSED,)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LatencyModel:
    return MODELS[request.param]()


def as_ops(chain: tuple[StageWork, ...]) -> list[OpWork]:
    ops = []
    for i, work in enumerate(chain):
        op = "Gemm" if not work.geometry.ndim else "ConvTranspose" if work.geometry.transposed else "Conv"
        shapes = [(work.batch, c, *s) for c, s in ((work.in_channels, work.spatial), (work.out_channels, ()))]
        out = (*shapes[1][:2], *(work.output_spatial if work.geometry.ndim else ()))
        count = work.weights + work.out_channels
        ops.append(OpWork(f"n{i}", op, work, (shapes[0],), (out,), (f"t{i}",), (f"t{i + 1}",), count, 4 * count))
    return ops


def test_units_margin_and_granularity_are_sensible(model: LatencyModel) -> None:
    assert model.unit in {"cycles", "s"}
    assert 0 <= model.margin < 1
    assert model.granularity >= 1


def test_costs_are_in_the_models_unit_and_count_what_is_countable(model: LatencyModel) -> None:
    for chain, cost in zip(CHAINS, model.chains(CHAINS), strict=True):
        assert cost.unit == model.unit and cost.kind in Kind
        assert cost.latency > 0 and cost.energy_pj > 0
        # a MAC is one multiply-add of a weight at an output position (input position if transposed)
        macs = [w.weights * w.batch * prod(w.spatial if w.geometry.transposed else w.output_spatial) for w in chain]
        assert cost.macs == sum(macs)
        assert cost.params == sum(w.weights + w.out_channels for w in chain)
        assert cost.size_bytes >= cost.params


def test_a_batch_of_requests_costs_what_each_costs_alone(model: LatencyModel) -> None:
    together = model.chains([*CHAINS, CHAINS[0]])
    assert together[-1] == together[0]
    assert together[:-1] == [model.chains([chain])[0] for chain in CHAINS]
    assert model.chains([]) == []


def test_another_instance_says_the_same(model: LatencyModel, request: pytest.FixtureRequest) -> None:
    if model.chains(CHAINS[:1])[0].kind is Kind.MEASURED:
        pytest.skip("measurements vary")
    other = MODELS[request.node.callspec.params["model"]]()
    assert other.chains(CHAINS) == model.chains(CHAINS)


def test_more_of_everything_costs_more(model: LatencyModel) -> None:
    bigger = replace(KERNEL, in_channels=128, out_channels=192, spatial=(32, 32))
    small, big = model.chains([(KERNEL,), (bigger,)])
    for metric in ("latency", "energy", "macs", "params", "size"):
        assert big.metric(metric) > small.metric(metric)


def test_a_chain_costs_no_more_than_its_stages_apart(model: LatencyModel) -> None:
    chain, first, second = model.chains([(KERNEL, POINTWISE), (KERNEL,), (POINTWISE,)])
    assert chain.latency <= (first.latency + second.latency) * (1 + model.margin)


def test_a_network_of_one_chain_costs_what_the_chain_costs(model: LatencyModel) -> None:
    for chain in CHAINS:
        (alone,), network = model.chains([chain]), model.network(as_ops(chain))
        assert network.latency == pytest.approx(alone.latency, rel=model.margin + 1e-12)
        assert (network.macs, network.params, network.unit) == (alone.macs, alone.params, alone.unit)


def test_an_empty_network_costs_nothing(model: LatencyModel) -> None:
    assert model.network([]).latency == 0
    assert isinstance(model.network([]), Cost)
