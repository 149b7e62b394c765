"""The floor of a network's price: against every plan of small networks, and random plans of real ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_sim.spec_file import load_spec
from codegen.asic_latency import AsicLatency
from codegen.asic_network import schedule
from passes import registry
from passes.core.cost import Kind, OpWork, StageWork
from passes.core.site import Geometry
from passes.onnx_graph import OnnxGraph
from passes.ranks.candidates import chain_works, dense_work

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"
MACHINES = ("edge_16x16", "gemmini_16x16", "eyeriss_12x14")
Options = dict[str, list[tuple[StageWork, ...]]]


def conv(i: int, o: int, k: int, size: int, bias: bool = True) -> StageWork:
    return StageWork(Geometry((k, k), pads=(k // 2,) * 4), i, o, (size, size), 1, bias)


def shape(channels: int, size: int) -> tuple[int, ...]:
    return (1, channels, size, size)


def layer(name: str, work: StageWork, reads: str, writes: str) -> OpWork:
    before, after = shape(work.in_channels, work.spatial[0]), shape(work.out_channels, work.output_spatial[0])
    return OpWork(name, "Conv", work, (before,), (after,), (reads,), (writes,), work.weights, work.weights)


def rewritten(ops: Sequence[OpWork], plan: Mapping[str, tuple[StageWork, ...]]) -> list[OpWork]:
    """Each op that the plan names as the stages of its chain, one after another."""
    out: list[OpWork] = []
    for op in ops:
        work = plan.get(op.name, (op.stage,))
        if work == (op.stage,):
            out.append(op)
            continue
        names = [*op.inputs, *(f"{op.name}/{i}" for i in range(1, len(work))), *op.outputs]
        for i, stage in enumerate(work):
            ends = {"inputs": (names[i],), "outputs": (names[i + 1],)}
            out.append(replace(op, name=f"{op.name}/{i}", stage=stage, **ends))  # type: ignore[arg-type]
    # What a sum can be part of goes by the shapes at the ends; those of the inner maps are not read.
    return out


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[OpWork], Options]:
    """A row of layers with up to three options; between them nothing, an activation, or a sum with an older map."""
    size = draw(st.integers(3, 12))
    widths = draw(st.lists(st.integers(1, 24), min_size=2, max_size=4))
    ops, options, tensor, maps = [], {}, "x", {"x": widths[0]}
    for i, (a, b) in enumerate(pairwise(widths)):
        k = draw(st.sampled_from([1, 3]))
        ops.append(layer(f"n{i}", conv(a, b, k, size), tensor, f"t{i}"))
        if draw(st.integers(0, 3)):
            ranks = draw(st.lists(st.integers(1, 12), max_size=2))
            options[f"n{i}"] = [(conv(a, b, k, size),)]
            options[f"n{i}"] += [(conv(a, r, 1, size, False), conv(r, b, k, size)) for r in ranks]
        tensor = f"t{i}"
        after = draw(st.sampled_from(["", "", "Relu", "Add"]))
        if after == "Relu":
            ops.append(OpWork(f"a{i}", "Relu", None, (shape(b, size),), (shape(b, size),), (tensor,), (f"a{i}",)))
            tensor = f"a{i}"
        elif after == "Add":
            other = draw(st.sampled_from([f"skip{i}", *(name for name, width in maps.items() if width == b)]))
            both, sum_shape = (tensor, other), shape(b, size)
            ops.append(OpWork(f"s{i}", "Add", None, (sum_shape, sum_shape), (sum_shape,), both, (f"s{i}",)))
            tensor = f"s{i}"
        maps[tensor] = b
    pool = (shape(widths[-1], size),), ((1, widths[-1], 1, 1),)
    ops.append(OpWork("pool", "GlobalAveragePool", None, *pool, (tensor,), ("y",)))
    return ops, options


@settings(max_examples=100, deadline=None)
@given(networks(), st.sampled_from(MACHINES), st.sampled_from(["2", "4", "64"]), st.sampled_from(["1", "16"]))
def test_against_every_plan(network: tuple[list[OpWork], Options], preset: str, kib: str, rate: str) -> None:
    ops, options = network
    model = AsicLatency(load_spec(preset, {"sram_kib": kib, "bytes_per_cycle": rate}))
    plans = [dict(zip(options, works, strict=True)) for works in product(*options.values())]
    costs = [model.network(rewritten(ops, plan)) for plan in plans]
    floor = model.floor(ops, options)
    assert floor.latency == min(cost.latency for cost in costs)
    assert floor.energy_pj <= min(cost.energy_pj for cost in costs)
    assert floor.dram_bytes <= min(cost.dram_bytes for cost in costs)
    assert (floor.kind, floor.macs, floor.params) == (Kind.SIMULATED, 0, 0)
    chains = schedule(ops, model.spec.array.residual_on_drain).chains
    if all(len(chain) == 1 for chain in chains):
        assert floor.energy_pj == pytest.approx(min(cost.energy_pj for cost in costs), rel=1e-11)
        assert floor.dram_bytes == min(cost.dram_bytes for cost in costs)


def test_neighbours_share_a_map_that_stays() -> None:
    """The floor lies below the sum of the sites' own prices, and is that of the two chains as one."""
    model = AsicLatency(load_spec())
    first, second = conv(64, 64, 3, 28), conv(64, 64, 1, 28)
    ops = [layer("n0", first, "x", "t"), layer("n1", second, "t", "y")]
    low = [(conv(64, 8, 3, 28, False), conv(8, 64, 1, 28))]
    apart = sum(cost.latency for cost in model.chains([low[0], (second,)]))
    floor = model.floor(ops, {"n0": low})
    assert floor.latency == model.chains([(*low[0], second)])[0].latency < apart
    # A reader more, and the map must go to DRAM.
    ops.append(OpWork("more", "Sigmoid", None, (shape(64, 28),), (shape(64, 28),), ("t",), ("z",)))
    assert model.floor(ops, {"n0": low}).latency == apart + model.network(ops[2:]).latency


def test_the_sum_made_elsewhere_counts_where_that_is_cheaper() -> None:
    """Bursts so large that a tile's residual costs more than a pass over the whole maps."""
    model = AsicLatency(load_spec("edge_16x16", {"burst_bytes": "4096", "sram_kib": "8", "accumulator_kib": "1"}))
    shapes = (shape(40, 15),)
    ops = [
        layer("n0", conv(40, 40, 3, 15), "x", "t"),
        OpWork("sum", "Add", None, shapes * 2, shapes, ("t", "x"), ("y",)),
    ]
    table = {row.name: row for row in model.layers(ops)}
    assert (table["sum"].unit, table["n0"].residual) == ("vector", "")
    assert model.floor(ops, {}).latency == model.network(ops).latency
    apart = AsicLatency(replace(model.spec, array=replace(model.spec.array, residual_on_drain=False)))
    assert model.network(ops) == apart.network(ops)


def test_options_must_take_the_place_of_a_stage() -> None:
    model = AsicLatency(load_spec())
    ops = [
        layer("n0", conv(8, 8, 3, 8), "x", "t"),
        OpWork("relu", "Relu", None, (shape(8, 8),), (shape(8, 8),), ("t",), ("y",)),
    ]
    with pytest.raises(ValueError, match=r"n0: .* does not have the input and output maps"):
        model.floor(ops, {"n0": [(conv(8, 9, 3, 8),)]})
    with pytest.raises(ValueError, match="n0 has no option"):
        model.floor(ops, {"n0": []})
    with pytest.raises(ValueError, match="relu has options, but is no stage"):
        model.floor(ops, {"relu": [(conv(8, 8, 3, 8),)]})


def real(name: str, per_site: int, seed: int) -> tuple[tuple[OpWork, ...], Options]:
    """A model's operators, and for each of its sites the dense layer and a few chains of random formats and ranks."""
    path = MODELS / name
    if not path.exists():
        pytest.skip(f"no model at {path}")
    graph = OnnxGraph.read(path)
    rng, formats = random.Random(seed), list(registry.FORMATS.load_all()[0].values())
    options: Options = {}
    for site in graph.sites().sites:
        options[site.name] = [(dense_work(site),)]
        fitting = [(f, full) for f in formats if (full := f.full_rank(site.stage)) is not None]
        for _ in range(per_site if fitting else 0):
            chosen, full = rng.choice(fitting)
            options[site.name].append(chain_works(site, chosen, tuple(rng.randint(1, max(1, r // 2)) for r in full)))
    return graph.workload(), options


@pytest.mark.parametrize("name", ["silero_vad.onnx", "yunet_n_dynamic.onnx", "fastestdet.onnx", "dtln_2.onnx"])
def test_random_plans_of_real_networks(name: str) -> None:
    model, rng = AsicLatency(load_spec()), random.Random(1)
    ops, options = real(name, 3, seed=0)
    floor = model.floor(ops, options)
    prices = {work: cost for works in options.values() for work, cost in zip(works, model.chains(works), strict=True)}
    plans = [{site: rng.choice(works) for site, works in options.items()} for _ in range(8)]
    for metric in ("latency", "energy"):  # the plan that is cheapest site by site, on its own
        plans.append({s: min(works, key=lambda w: prices[w].metric(metric)) for s, works in options.items()})
    costs = [model.network(rewritten(ops, plan)) for plan in plans]
    assert floor.latency <= min(cost.latency for cost in costs) <= 1.005 * floor.latency
    assert floor.energy_pj <= min(cost.energy_pj for cost in costs)
    assert floor.dram_bytes <= min(cost.dram_bytes for cost in costs)
    assert floor.kind is costs[0].kind


def test_the_floor_of_resnet20_is_reached() -> None:
    """No two of its convolutions follow each other directly, so its best plan is found one site at a time."""
    model = AsicLatency(load_spec())
    ops, options = real("resnet20_cifar10.onnx", 6, seed=0)
    plan = {}
    for site, works in options.items():
        plan[site] = min(works, key=lambda work: model.network(rewritten(ops, {site: work})).latency)
    floor = model.floor(ops, options)
    assert floor.latency == model.network(rewritten(ops, plan)).latency
    assert floor.latency < 0.7 * model.network(ops).latency
