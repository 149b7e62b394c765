"""The accelerator as a latency model: chains and networks agree, and every operator goes to the right unit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from accel_sim.spec_file import load_spec, presets
from codegen.asic_latency import AsicLatency, LayerRow
from passes.core.cost import Cost, Kind, LatencyModel, OpWork, StageWork
from passes.core.site import Geometry
from passes.errors import UnsupportedError

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"


def conv(i: int, o: int, k: int = 1, size: int = 14, bias: bool = True, groups: int = 1) -> StageWork:
    return StageWork(Geometry((k, k), pads=(k // 2,) * 4, groups=groups), i, o, (size, size), 1, bias)


def tucker(rank: int, channels: int = 256, size: int = 14) -> tuple[StageWork, ...]:
    first, last = conv(channels, rank, 1, size, False), conv(rank, channels, 1, size)
    return first, conv(rank, rank, 3, size, False), last


def node(
    name: str, op: str, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]], n: int = 0
) -> OpWork:
    return OpWork(name, op, None, (*inputs.values(),), (*outputs.values(),), (*inputs,), (*outputs,), n, 4 * n)


def stages(*works: StageWork, start: str = "t") -> list[OpWork]:
    """The stages as nodes of a network, one after another: tensors t0, t1, ..."""
    ops = []
    for i, work in enumerate(works):
        params = work.weights + (work.out_channels if work.bias else 0)
        shape = ((work.batch, work.in_channels, *work.spatial), (work.batch, work.out_channels, *work.output_spatial))
        names = (f"{start}{i}", f"{start}{i + 1}")
        ops.append(OpWork(f"n{i}", "Conv", work, shape[:1], shape[1:], names[:1], names[1:], params, 4 * params))
    return ops


@pytest.fixture(scope="module")
def model() -> AsicLatency:
    return AsicLatency(load_spec())


def rows(model: AsicLatency, ops: list[OpWork]) -> dict[str, LayerRow]:
    return {row.name: row for row in model.layers(ops)}


def test_it_is_a_latency_model(model: AsicLatency) -> None:
    contract: LatencyModel = model
    assert (contract.unit, contract.margin, contract.granularity) == ("cycles", 0.0, 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 3])), min_size=2, max_size=5), st.integers(3, 15))
def test_a_network_of_one_chain_costs_what_the_chain_does(layers: list[tuple[int, int]], size: int) -> None:
    works = tuple(conv(a[0], b[0], b[1], size) for a, b in pairwise(layers))
    model = AsicLatency(load_spec("edge_16x16", {"sram_kib": "8"}))
    assert model.network(stages(*works)) == model.chains([works])[0]


def test_chains_come_back_in_order_and_from_the_cache(model: AsicLatency) -> None:
    works = [tucker(r) for r in (8, 24, 8, 16)]
    costs = model.chains(works)
    assert costs[0] == costs[2]
    assert costs == [AsicLatency(load_spec()).chains([work])[0] for work in works] == model.chains(works)
    assert model.chains([]) == []


def test_a_cost_is_complete(model: AsicLatency) -> None:
    work = tucker(16)
    cost = model.chains([work])[0]
    weights = 256 * 16 + 16 * 16 * 9 + 16 * 256
    assert cost.macs == weights * 196
    assert (cost.params, cost.size_bytes) == (weights + 256, 4 * (weights + 256))
    assert (cost.unit, cost.kind) == ("cycles", Kind.SIMULATED)
    assert cost.dram_bytes >= 2 * 256 * 196 + weights
    assert cost.energy_pj > cost.dram_bytes * 64.0 + cost.macs * 0.208
    assert AsicLatency(load_spec(), weight_file_bytes=2).chains([work])[0].size_bytes == 2 * (weights + 256)


def test_the_staircase_of_a_chain(model: AsicLatency) -> None:
    """One rank more than the array is wide costs half as much again; one less costs nearly the same."""
    at15, at16, at17, at32, at33 = (cost.latency for cost in model.chains([tucker(r) for r in (15, 16, 17, 32, 33)]))
    assert at17 > 1.5 * at16
    assert at33 > 1.3 * at32
    assert at15 > 0.97 * at16
    dense = model.chains([(conv(256, 256, 3),)])[0].latency
    # Weights stationary at full use: 144 x 16 folds of 196 positions, and less than 2 % for fills, loads and the store.
    assert 144 * 16 * 196 < dense < 1.02 * 144 * 16 * 196


def test_a_chain_says_what_stays_on_chip(model: AsicLatency) -> None:
    price = model.chain_prices([tucker(16, 64, 56)])[0]
    assert price.fused
    assert price.dram_bytes < 0.7 * price.layerwise_dram_bytes
    table = rows(model, stages(*tucker(16, 64, 56)))
    assert [row.on_chip for row in table.values()] == ["output", "input and output", "input"]


@pytest.mark.parametrize("op", ["Relu", "HardSwish", "BatchNormalization", "Mul"])
def test_what_is_applied_on_the_way_out_does_not_part_a_chain(model: AsicLatency, op: str) -> None:
    first, second = conv(64, 16), conv(16, 64, 3)
    shape = (1, 16, 14, 14)
    table = rows(model, _between(node("between", op, {"t1": shape}, {"u0": shape}, 16)))
    assert table["between"].unit == "on the way out"
    assert (table["between"].cost.latency, table["between"].cost.energy_pj) == (0, 0)
    (chain,) = model.chains([(first, second)])
    assert table["n0"].cycles + table["m"].cycles == chain.latency


def _rest(op: OpWork) -> tuple[object, ...]:
    return op.op, op.stage, op.input_shapes, op.output_shapes, op.inputs, op.outputs, op.weight_params, op.weight_bytes


def _between(op: OpWork) -> list[OpWork]:
    """Two stages with ``op`` between t1 and u0."""
    second = stages(conv(16, 64, 3), start="u")[0]
    return [*stages(conv(64, 16)), op, OpWork("m", *_rest(second))]  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["Identity", "QuantizeLinear", "Dropout", "Cast"])
def test_what_does_nothing_does_not_part_a_chain(model: AsicLatency, op: str) -> None:
    shape = (1, 16, 14, 14)
    ops = _between(node("x", op, {"t1": shape}, {"u0": shape}))
    assert model.network(ops).latency == model.chains([(conv(64, 16), conv(16, 64, 3))])[0].latency


def test_a_bias_node_does_not_part_a_chain_a_map_sized_constant_does(model: AsicLatency) -> None:
    shape = (1, 16, 14, 14)
    fused = model.chains([(conv(64, 16), conv(16, 64, 3))])[0].latency
    assert model.network(_between(node("x", "Add", {"t1": shape}, {"u0": shape}, 16))).latency == fused
    table = rows(model, _between(node("x", "Add", {"t1": shape}, {"u0": shape}, 16 * 196)))
    assert table["x"].unit == "vector"
    assert table["x"].dram_bytes >= 3 * 16 * 196  # the constant is loaded as well


def test_a_second_reader_keeps_the_map_in_dram(model: AsicLatency) -> None:
    first, second = conv(64, 16), conv(16, 64, 3)
    reader = node("sum", "Add", {"t1": (1, 16, 14, 14), "z": (1, 16, 14, 14)}, {"y": (1, 16, 14, 14)})
    table = rows(model, [*stages(first, second), reader])
    alone = model.chains([(first,), (second,)])
    assert [table["n0"].cost, table["n1"].cost] == alone
    assert table["sum"].unit == "vector"


def test_an_activation_with_two_readers_before_it_is_an_operation(model: AsicLatency) -> None:
    shape = (1, 16, 14, 14)
    ops = [*stages(conv(64, 16)), node("relu", "Relu", {"t1": shape}, {"a": shape})]
    assert rows(model, ops)["relu"].unit == "on the way out"
    ops.append(node("gate", "Sigmoid", {"t1": shape}, {"b": shape}))
    table = rows(model, ops)
    assert table["relu"].unit == table["gate"].unit == "vector"
    assert table["relu"].cycles > 0


def test_an_activation_after_a_sum_costs_nothing(model: AsicLatency) -> None:
    shape = (1, 16, 14, 14)
    ops = [node("sum", "Add", {"a": shape, "b": shape}, {"c": shape}), node("relu", "Relu", {"c": shape}, {"d": shape})]
    assert [row.unit for row in model.layers(ops)] == ["vector", "on the way out"]


MAP = (1, 16, 14, 14)


def sum_of(*names: str, out: str = "s", shapes: tuple[tuple[int, ...], ...] = (MAP, MAP), name: str = "sum") -> OpWork:
    return node(name, "Add", dict(zip(names, shapes, strict=True)), {out: MAP})


def test_a_residual_is_added_on_the_way_out(model: AsicLatency) -> None:
    """In once more through the channel, instead of out, in twice, and out."""
    work, shape = conv(16, 16, 3, 32), (1, 16, 32, 32)
    add = node("sum", "Add", {"t1": shape, "x": shape}, {"s": shape})
    table = rows(model, [*stages(work), add, node("relu", "Relu", {"s": shape}, {"y": shape})])
    alone, vector = model.chains([(work,)])[0], rows(model, [add])["sum"]
    row = table["n0"]
    assert row.residual == "sum"
    assert [table[n].unit for n in ("sum", "relu")] == ["on the way out"] * 2
    assert table["sum"].cost == table["relu"].cost == Cost(kind=Kind.SIMULATED)
    assert alone.latency < row.cycles <= alone.latency + 200 < alone.latency + vector.cycles
    assert row.dram_bytes == alone.dram_bytes + 16 * 1024
    assert vector.dram_bytes == 3 * 16 * 1024
    # the map from DRAM, each value a byte, into the accumulator memory and out
    energy = model.spec.energy
    per_value = energy.dram_pj_per_byte
    per_value += energy.accumulator_read_pj_per_byte + energy.accumulator_write_pj_per_byte
    assert row.cost.energy_pj == pytest.approx(alone.energy_pj + 16 * 1024 * per_value, rel=1e-9)
    assert row.cost.macs == alone.macs


def test_without_an_adder_on_the_way_out_a_sum_is_an_operation() -> None:
    model = AsicLatency(load_spec("edge_16x16", {"residual_on_drain": "false"}))
    table = rows(model, [*stages(conv(16, 16, 3)), sum_of("t1", "x")])
    assert (table["sum"].unit, table["n0"].residual) == ("vector", "")
    assert table["n0"].cost == model.chains([(conv(16, 16, 3),)])[0]


@pytest.mark.parametrize("op", ["Add", "BatchNormalization", "Mul", "DequantizeLinear"])
def test_a_bias_or_scale_may_stand_before_the_sum(model: AsicLatency, op: str) -> None:
    ops = [*stages(conv(16, 16)), node("x", op, {"t1": MAP}, {"b": MAP}, 16), sum_of("z", "b")]
    assert rows(model, ops)["n0"].residual == "sum"


def test_the_sum_goes_with_the_last_stage_of_a_chain(model: AsicLatency) -> None:
    work = (conv(16, 4, 1, bias=False), conv(4, 16, 3))
    table = rows(model, [*stages(*work), sum_of("t2", "t0")])
    assert [table[n].residual for n in ("n0", "n1")] == ["", "sum"]
    assert [table[n].on_chip for n in ("n0", "n1")] == ["output", "input"]
    price = model.chain_prices([work], [True])[0]
    assert [table[n].cycles for n in ("n0", "n1")] == [stage.cycles for stage in price.stages]
    assert price.cycles > model.chain_prices([work])[0].cycles


def test_of_two_stages_the_later_takes_the_other_s_result(model: AsicLatency) -> None:
    first, second = stages(conv(16, 16), start="a")[0], stages(conv(16, 16, 3), start="b")[0]
    ops = [first, OpWork("m0", *_rest(second)), sum_of("a1", "b1")]  # type: ignore[arg-type]
    assert [row.residual for row in model.layers(ops)] == ["", "sum", ""]
    # Where the later one has a second reader, the earlier one takes it.
    ops.append(node("other", "Sigmoid", {"b1": MAP}, {"o": MAP}))
    assert [row.residual for row in model.layers(ops)] == ["sum", "", "", ""]


@pytest.mark.parametrize(
    ("before", "add"),
    [
        ([], sum_of("t1", "x", shapes=(MAP, (1, 16, 1, 1)))),  # the other map is broadcast
        ([], node("sum", "Mul", {"t1": MAP, "x": MAP}, {"s": MAP})),
        ([], node("sum", "Add", {"t1": MAP}, {"s": MAP}, 16 * 196)),  # a constant
        ([node("relu", "Relu", {"t1": MAP}, {"r": MAP})], sum_of("r", "x")),
        ([node("flat", "Reshape", {"t1": (1, 16, 196)}, {"r": MAP})], sum_of("r", "x")),
        ([node("more", "Sigmoid", {"t1": MAP}, {"o": MAP})], sum_of("t1", "x")),  # a second reader
        ([sum_of("t1", "x", out="r", name="first")], sum_of("r", "y")),  # one residual is all a stage takes
    ],
)
def test_what_is_no_residual_stays_an_operation(model: AsicLatency, before: list[OpWork], add: OpWork) -> None:
    assert rows(model, [*stages(conv(16, 16)), *before, add])["sum"].unit == "vector"


def test_a_map_added_to_itself_is_an_operation(model: AsicLatency) -> None:
    add = OpWork("sum", "Add", None, (MAP, MAP), (MAP,), ("t1", "t1"), ("s",))
    assert rows(model, [*stages(conv(16, 16)), add])["sum"].unit == "vector"


def test_a_sum_ends_a_chain(model: AsicLatency) -> None:
    second = stages(conv(16, 8), start="s")[0]
    ops = [*stages(conv(16, 16)), sum_of("t1", "x", out="s0"), OpWork("m", *_rest(second))]  # type: ignore[arg-type]
    table = rows(model, ops)
    assert table["n0"].residual == "sum"
    assert table["n0"].on_chip == table["m"].on_chip == ""


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(2, 15),
    st.sampled_from(["1", "64", "1024", "4096"]), st.sampled_from(["8", "256"]), st.booleans(),
)  # fmt: skip
def test_a_sum_is_never_free_and_never_dearer_than_on_its_own(
    channels: int, filters: int, kernel: int, size: int, burst: str, kib: str, pipelined: bool
) -> None:
    options = {"burst_bytes": burst, "sram_kib": kib, "pipelined_requests": str(pipelined).lower()}
    model = AsicLatency(load_spec("edge_16x16", options))
    apart = AsicLatency(load_spec("edge_16x16", {**options, "residual_on_drain": "false"}))
    shape = (1, filters, size, size)
    ops = [*stages(conv(channels, filters, kernel, size)), node("sum", "Add", {"t1": shape, "x": shape}, {"s": shape})]
    with_sum, own = model.network(ops).latency, apart.network(ops).latency
    assert apart.network(ops[:1]).latency <= with_sum <= own


def test_shape_operators_are_free(model: AsicLatency) -> None:
    ops = [
        node("flat", "Flatten", {"x": (1, 16, 14, 14)}, {"y": (1, 3136)}),
        node("shape", "Shape", {"x": (1, 16, 14, 14)}, {"s": (4,)}),
        node("pick", "Gather", {"s": (4,)}, {"g": ()}),
        node("list", "Concat", {"g": (1,), "h": (1,)}, {"l": (2,)}),
    ]
    assert {row.unit for row in model.layers(ops)} == {"free"}
    assert model.network(ops) == Cost(kind=Kind.SIMULATED)


def test_the_host_is_named_and_makes_the_whole_an_estimate(model: AsicLatency) -> None:
    """2 000 cycles a call, a cycle a MAC, 4 an element touched."""
    lstm = node("rnn", "LSTM", {"x": (7, 1, 32)}, {"y": (7, 1, 1, 16)}, 3200)
    loop = node("loop", "Loop", {"n": ()}, {"z": ()}, 10)
    ops = [*stages(conv(64, 16)), lstm, loop]
    table = rows(model, ops)
    assert model.host_ops(ops) == ("rnn", "loop")
    assert table["rnn"].cycles == 2000 + 3200 + 4 * (7 * 32 + 7 * 16)
    assert table["loop"].cycles == 2000 + 10 + 4 * 2
    assert model.network(ops).kind is Kind.ESTIMATED
    assert model.network(ops[:1]).kind is Kind.SIMULATED


def test_an_lstm_with_known_work_is_priced_by_its_macs(model: AsicLatency) -> None:
    work = StageWork(Geometry(), 48, 64, (), 7)
    op = OpWork("rnn", "LSTM", work, ((7, 1, 32),), ((7, 1, 1, 16),), ("x",), ("y",), 3200, 12800)
    assert model.layers([op])[0].cycles == 2000 + 48 * 64 * 7 + 4 * (7 * 32 + 7 * 16)


def test_a_product_of_activations_runs_on_the_array(model: AsicLatency) -> None:
    """4 heads of 64 x 32 times 32 x 64: both operands are loaded, 4 times 64 x 64 x 32 MACs are done."""
    op = node("qk", "MatMul", {"q": (1, 4, 64, 32), "k": (1, 4, 32, 64)}, {"s": (1, 4, 64, 64)})
    row = model.layers([op])[0]
    assert row.unit == "array"
    assert row.cost.macs == 4 * 64 * 64 * 32
    assert row.dram_bytes == 4 * (64 * 32 + 32 * 64 + 64 * 64)


def test_linear_layers_and_other_ranks(model: AsicLatency) -> None:
    works = [
        (StageWork(Geometry(), 512, 1000, (), 1),),
        (StageWork(Geometry((5,), pads=(2, 2)), 32, 32, (400,), 1),),
        (StageWork(Geometry((3, 3, 3), pads=(1,) * 6), 16, 16, (8, 14, 14), 2),),
        (StageWork(Geometry((4, 4), (2, 2), pads=(1,) * 4, transposed=True), 32, 16, (14, 14), 1),),
        (conv(96, 96, 3, groups=96),),
    ]
    peak = load_spec().peak_macs_per_cycle
    for (work,), cost in zip(works, model.chains(works), strict=True):
        assert cost.macs == work.macs
        assert cost.latency > max(work.macs / peak, cost.dram_bytes / 16)
        assert cost.dram_bytes >= work.weights


def test_a_linear_layer_of_one_row_is_bound_by_its_weights() -> None:
    """At 4 bytes a cycle the 512 KiB take 131 072 cycles; 2 048 folds of 16 cycles each hide behind them."""
    work = StageWork(Geometry(), 512, 1024, (), 1)
    op = OpWork("fc", "Gemm", work, ((1, 512),), ((1, 1024),), ("x",), ("y",), work.weights, 4 * work.weights)
    row = AsicLatency(load_spec("edge_16x16", {"bytes_per_cycle": "4"})).layers([op])[0]
    assert row.bound == "dram"
    assert work.weights / 4 < row.cycles < 1.1 * work.weights / 4
    assert 0 < row.utilisation < 0.1


def test_a_dense_convolution_is_bound_by_the_array(model: AsicLatency) -> None:
    row = model.layers(stages(conv(256, 256, 3)))[0]
    assert (row.bound, row.dataflow, row.unit) == ("compute", "ws", "array")
    assert row.utilisation == pytest.approx(256 * 256 * 9 * 196 / 256 / row.cycles, rel=1e-12)
    assert row.utilisation > 0.98
    assert "filters" in row.tiling


def test_what_fits_no_memory_is_reported_as_unsupported() -> None:
    tiny = AsicLatency(load_spec("edge_16x16", {"sram_kib": "2", "accumulator_kib": "1"}))
    with pytest.raises(UnsupportedError, match="edge_16x16"):
        tiny.chains([(StageWork(Geometry((3000,)), 1, 1, (4000,), 1),)])


@pytest.mark.parametrize("preset", presets())
def test_every_preset_prices_every_kind(preset: str) -> None:
    model = AsicLatency(load_spec(preset))
    dense, chain = model.chains([(conv(256, 256, 3),), tucker(14)])
    assert chain.latency < dense.latency
    assert dense.latency >= 256 * 256 * 9 * 196 / load_spec(preset).peak_macs_per_cycle


def _chain_network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    nodes, constants, spatial = [], [], "x"
    for i, work in enumerate(tucker(16, 64, 28)):
        k = work.geometry.kernel[0]
        weight = rng.standard_normal((work.out_channels, work.in_channels, k, k)).astype(np.float32)
        constants.append(onnx.numpy_helper.from_array(weight, f"w{i}"))
        if work.bias:
            constants.append(onnx.numpy_helper.from_array(weight[:, 0, 0, 0].copy(), f"b{i}"))
        out = f"t{i}" if i < 2 else "y"
        inputs = [spatial, f"w{i}", *([f"b{i}"] if work.bias else [])]
        nodes.append(helper.make_node("Conv", inputs, [out], name=f"c{i}", pads=[k // 2] * 4))
        spatial = out
    info = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 64, 28, 28)) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [next(info)], [next(info)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_a_written_chain_costs_what_the_solver_was_told(model: AsicLatency) -> None:
    """Through the ONNX frontend: the network that holds a chain is priced like the chain, weights included."""
    onnx_graph = pytest.importorskip("passes.onnx_graph")
    ops = onnx_graph.OnnxGraph.from_model(_chain_network()).workload()
    assert model.network(ops) == model.chains([tucker(16, 64, 28)])[0]


def test_a_real_network() -> None:
    """ResNet-20 on CIFAR-10: 40.6 M MACs, all but the shortcuts' slices and the pooling on the array."""
    path = MODELS / "resnet20_cifar10.onnx"
    if not path.exists():
        pytest.skip(f"no model at {path}")
    onnx_graph = pytest.importorskip("passes.onnx_graph")
    model = AsicLatency(load_spec())
    ops = onnx_graph.OnnxGraph.read(path).workload()
    cost, table = model.network(ops), model.layers(ops)
    assert model.host_ops(ops) == ()
    assert cost.kind is Kind.SIMULATED
    assert cost.macs == sum(op.stage.macs for op in ops if op.stage is not None)
    assert cost.latency == sum(row.cycles for row in table) > cost.macs / 256
    assert sum(row.unit == "array" for row in table) == 20
    assert all(row.unit == "on the way out" for row in table if row.op in ("Relu", "Add"))
    # Nine sums: each map of 16 KiB, 8 KiB, 4 KiB comes once more, and is no longer written, read twice and written.
    apart = AsicLatency(load_spec("edge_16x16", {"residual_on_drain": "false"}))
    assert apart.network(ops).dram_bytes - cost.dram_bytes == 3 * 2 * (16 + 8 + 4) * 1024
    assert cost.latency < 0.92 * apart.network(ops).latency
