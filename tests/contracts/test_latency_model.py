"""What every price list must do: passes.core.cost.LatencyModel, for each implementation of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
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


def test_no_plan_gets_below_the_floor(model: LatencyModel) -> None:
    """Two sites in a row and one apart, every plan priced as a network."""
    narrow = StageWork(Geometry((1, 1)), 32, 8, (16, 16)), StageWork(Geometry((3, 3), pads=(1,) * 4), 8, 48, (16, 16))
    low = StageWork(Geometry((1, 1)), 48, 4, (16, 16)), StageWork(Geometry((1, 1)), 4, 64, (16, 16))
    options: dict[str, list[tuple[StageWork, ...]]] = {"n0": [(KERNEL,), narrow], "n1": [(POINTWISE,), low]}
    (first, second), (rest,) = as_ops((KERNEL, POINTWISE)), as_ops((LINEAR,))
    rest = replace(rest, name="rest", inputs=("x",), outputs=("y",))

    def placed(op: OpWork, work: tuple[StageWork, ...]) -> list[OpWork]:
        ends = (op.inputs[0], *(f"{op.name}/{i}" for i in range(1, len(work))), op.outputs[0])
        return [
            replace(part, name=f"{op.name}/{i}", inputs=ends[i : i + 1], outputs=ends[i + 1 : i + 2])
            for i, part in enumerate(as_ops(work))
        ]

    plans = [
        model.network([*placed(first, a), *placed(second, b), rest]) for a, b in product(options["n0"], options["n1"])
    ]
    floor = model.floor([first, second, rest], options)
    assert floor.unit == model.unit
    assert 0 < floor.latency <= min(plan.latency for plan in plans)
    assert 0 < floor.energy_pj <= min(plan.energy_pj for plan in plans)
    assert floor.dram_bytes <= min(plan.dram_bytes for plan in plans)
    # Fewer choices, or none, leave no less to pay.
    kept = model.floor([first, second, rest], {})
    assert kept.latency >= floor.latency
    assert kept.latency == pytest.approx(model.network([first, second, rest]).latency, rel=model.margin + 1e-9)


def test_an_empty_network_costs_nothing(model: LatencyModel) -> None:
    assert model.network([]).latency == model.floor([], {}).latency == 0
    assert isinstance(model.network([]), Cost)
