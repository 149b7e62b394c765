"""Whole networks on the engine: bytes against the reference of integer networks, cycles against the predictions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from accel_sim.engine import Result, run
from accel_sim.program.isa import Load, Matmul, Space, Store
from accel_sim.spec_file import load_spec
from codegen.asic_compile.compile import Compiled, compile_graph
from codegen.asic_compile.run import call_host, run_network, run_program
from codegen.asic_latency import AsicLatency
from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QuantizedGraph
from codegen.quantized.onnx_network import integer_options
from codegen.quantized.reference import run_quantized
from passes.errors import UnsupportedError
from tests.codegen.asic_compile.random_networks import Network, residual_network

SHARED = Path(__file__).resolve().parents[4] / "shared"
DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits.onnx"
RESNET = SHARED / "models" / "resnet20_cifar10_qdq.onnx"


def compiled(graph: QuantizedGraph, machine: str = "edge_16x16", **changes: str) -> Compiled:
    spec = load_spec(machine, changes)
    return compile_graph(graph, spec, AsicLatency(spec))


def on_engine(
    found: Compiled, x: np.ndarray, machine: str = "edge_16x16", **changes: str
) -> tuple[dict[str, np.ndarray], Result]:
    """Bytes of the outputs, samples in a row as the reference gives them."""
    (tensor,) = [t for t in found.program.tensors if t.role == "input"]
    result = run(
        found.program, load_spec(machine, changes), {tensor.name: x.reshape(-1, *tensor.shape)}, host=call_host
    )
    shapes = {name: found.graph.tensors[name].shape for name in found.graph.outputs}
    return {name: result.outputs[name].reshape(-1, *shape[1:]) for name, shape in shapes.items()}, result


def same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def predicted_exactly(found: Compiled, result: Result) -> bool:
    cycles = [int(b - a) for a, b in pairwise(result.schedule.barriers)]
    return cycles == [marker.predicted_cycles for marker in found.program.markers]


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 2),
    st.integers(2, 20),
    st.integers(4, 9),
    st.sampled_from(["edge_16x16", "gemmini_16x16", "tpu_256x256", "small"]),
)
def test_random_networks(seed: int, batch: int, channels: int, size: int, machine: str) -> None:
    graph = residual_network(seed, batch, channels, size)
    changes = {}
    if machine == "small":
        machine, changes = "edge_16x16", {"rows": "4", "columns": "6", "sram_kib": "16", "accumulator_kib": "4"}
        changes |= {"double_buffered": str(seed % 3 > 0).lower(), "bytes_per_cycle": "3", "pipelined_requests": "false"}
    found = compiled(graph, machine, **changes)
    x = np.random.default_rng(seed).integers(0, 128, (2 * batch, *graph.tensors[graph.inputs[0]].shape[1:]))
    x = x.astype(np.int8 if graph.tensors[graph.inputs[0]].signed else np.uint8)
    y, result = on_engine(found, x, machine, **changes)
    assert same(y, run_quantized(graph, {graph.inputs[0]: x}))
    assert predicted_exactly(found, result)
    assert not found.host_rows


def test_a_sum_waits_for_an_operand_that_the_network_has_later() -> None:
    n = Network(1, (1, 4, 6, 6))
    first = n.conv(n.input, 8, (3, 3), pads=(1,) * 4)
    other = n.table(n.conv(n.conv(n.input, 8, (1, 1)), 8, (1, 1)))
    graph = n.graph(n.sum(first, other))
    # The first convolution's result is read by the sum alone; it stands before what it is added to.
    found = compiled(graph)
    x = n.values(1)
    assert same(on_engine(found, x)[0], run_quantized(graph, {n.input: x}))
    assert len(found.plan.sums) == 1


def test_maps_of_a_chain_never_touch_the_channel() -> None:
    """56x56, 16 -> 8 -> 8 -> 16: DRAM sees the input, the output, weights and biases, and nothing else."""
    n = Network(2, (1, 16, 28, 28))
    a = n.conv(n.input, 8, (1, 1), bias=False)
    y = n.conv(n.conv(a, 8, (3, 3), pads=(1,) * 4), 16, (1, 1))
    found = compiled(n.graph(y))
    assert [row.price.on_chip for row in found.rows] == ["output", "input and output", "input"]
    loads = [i for i in found.program.code if isinstance(i, Load)]
    assert all(
        load.dram_address < 28 * 28 * 16 or load.dram_address >= found.program.constants_address for load in loads
    )
    outside = [s for s in found.program.code if isinstance(s, Store) and not s.to_scratchpad]
    assert sum(s.loops.run * np.prod(s.loops.counts) for s in outside) == 28 * 28 * 16
    assert found.saved_bytes > 4 * 28 * 28 * 8


def test_a_residual_waits_as_bytes_beside_its_sums() -> None:
    n = Network(3, (1, 16, 16, 16))
    graph = n.graph(n.sum(n.conv(n.input, 16, (3, 3), pads=(1,) * 4), n.input))
    found = compiled(graph)
    residuals = [i for i in found.program.code if isinstance(i, Load) and i.space is Space.ACCUMULATOR]
    assert sum(load.loops.run * np.prod(load.loops.counts) for load in residuals) == 16 * 16 * 16
    assert [row.price.unit for row in found.rows] == ["array", "on the way out"]
    assert found.rows[0].marker == found.rows[1].marker


def test_a_flattened_map_reaches_a_linear_layer_without_a_move() -> None:
    n = Network(4, (2, 20, 3, 5))
    mapped = n.conv(n.input, 20, (1, 1))
    graph = n.graph(n.conv(n.reshape(mapped, (2, 300)), 4, ()))
    found = compiled(graph)
    assert len(found.program.markers) == 2 and not found.layout_changes
    x = n.values(3)
    assert same(on_engine(found, x)[0], run_quantized(graph, {n.input: x}))


def test_a_layout_change_is_made_and_named() -> None:
    """A flattened map of several blocks as an output lies feature by feature: its bytes have to move."""
    n = Network(5, (1, 20, 3, 5))
    flat = n.reshape(n.conv(n.input, 20, (1, 1)), (1, 300))
    graph = n.graph(n.table(flat), flat)
    found = compiled(graph)
    assert found.layout_changes == (flat,)
    x = n.values(1)
    y, result = on_engine(found, x)
    assert same(y, run_quantized(graph, {n.input: x}))
    assert predicted_exactly(found, result)


def test_a_transposed_convolution_goes_to_the_host_with_its_reason() -> None:
    n = Network(6, (1, 6, 5, 5))
    up = n.conv(n.conv(n.input, 4, (1, 1)), 3, (2, 2), strides=(2, 2), transposed=True)
    graph = n.graph(n.conv(up, 5, (1, 1)))
    found = compiled(graph)
    (host,) = found.host_rows
    assert "transposed" in host.reason and host.price.cycles > 0
    assert found.program.markers[host.marker].predicted_cycles == -1
    x = n.values(1)
    y = on_engine(found, x)[0]
    wanted = run_quantized(graph, {n.input: x})
    worst = max(np.abs(y[name].astype(int) - wanted[name]).max() for name in wanted)
    assert worst <= 2  # the host computes in floats: a byte may round to its neighbour before the last layer


def test_other_widths_are_refused() -> None:
    n = Network(7, (1, 4, 4, 4))
    graph = n.graph(n.conv(n.input, 4, (1, 1)))
    with pytest.raises(UnsupportedError, match="8-bit"):
        compiled(graph, "edge_16x16", data_bits="16")


def test_what_gives_floats_at_the_end_runs_behind_the_program(tmp_path: Path) -> None:
    """The example's digits, quantized, with a softmax whose result nobody quantizes: as onnxruntime has it."""
    model = onnx.load(DIGITS)
    logits = model.graph.output[0].name
    rng = np.random.default_rng(0)
    shape = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    name = model.graph.input[0].name
    x = rng.normal(size=(32, *shape[1:])).astype(np.float32)
    path = tmp_path / "digits_qdq.onnx"
    quantize_static(str(DIGITS), str(path), _Batches(name, x), quant_format=QuantFormat.QDQ)
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("Softmax", [logits], ["shares"], axis=-1))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("shares", onnx.TensorProto.FLOAT, ["n", 10]))
    onnx.save(model, path)
    found = compiled(read_qdq(path))
    y, _ = run_network(found, load_spec(), {name: x})
    session = onnxruntime.InferenceSession(str(path), integer_options(signed=True), ["CPUExecutionProvider"])
    truth = np.concatenate([session.run(None, {name: row[None]})[0] for row in x])
    np.testing.assert_allclose(y["shares"], truth, rtol=0, atol=1e-6)
    assert [operation.op for operation in found.tail] and found.host_rows


def test_an_input_that_leaves_as_it_came_is_an_output(tmp_path: Path) -> None:
    """Quantized and back, as onnxruntime has it; the program itself does not move it."""
    path = tmp_path / "echo.onnx"
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 4, 1, 1)).astype(np.float32)
    tensors = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", c, 5, 5]) for n, c in SHAPES]
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["y"]), onnx.helper.make_node("Identity", ["x"], ["z"])]
    graph = onnx.helper.make_graph(nodes, "echo", tensors[:1], tensors[1:], [onnx.numpy_helper.from_array(weight, "w")])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    x = rng.normal(size=(6, 4, 5, 5)).astype(np.float32)
    quantized = tmp_path / "echo_qdq.onnx"
    quantize_static(str(path), str(quantized), _Batches("x", x), quant_format=QuantFormat.QDQ)
    found, _ = run_network(compiled(read_qdq(quantized)), load_spec(), {"x": x})
    session = onnxruntime.InferenceSession(str(quantized), providers=["CPUExecutionProvider"])
    truth = dict(zip(("y", "z"), session.run(["y", "z"], {"x": x}), strict=True))
    np.testing.assert_allclose(found["z"], truth["z"], rtol=0, atol=1e-6)
    assert np.abs(found["y"] - truth["y"]).max() < 0.02 * np.abs(truth["y"]).max()


SHAPES = (("x", 4), ("y", 8), ("z", 4))


class _Batches(CalibrationDataReader):
    def __init__(self, name: str, x: np.ndarray) -> None:
        self.feeds = iter([{name: row[None]} for row in x])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@pytest.mark.skipif(not RESNET.exists(), reason=f"no {RESNET.name} in the folder of shared models")
def test_resnet20() -> None:
    """Bytes are the reference's, the class is onnxruntime's, and every layer takes the cycles that were predicted."""
    graph = read_qdq(RESNET)
    found = compiled(graph)
    rng = np.random.default_rng(0)
    feeds = {graph.input_names[0]: rng.normal(size=(6, 3, 32, 32)).astype(np.float32)}
    name = graph.inputs[0]
    outputs, result = run_program(
        found.program, load_spec(), {name: feeds[graph.input_names[0]].reshape(6, 1, 3, 32, 32)}
    )
    session = onnxruntime.InferenceSession(str(RESNET), providers=["CPUExecutionProvider"])
    truth = np.concatenate([session.run(None, {graph.input_names[0]: x[None]})[0] for x in feeds[graph.input_names[0]]])
    assert (outputs[graph.outputs[0]].reshape(6, 10).argmax(axis=1) == truth.argmax(axis=1)).all()
    assert predicted_exactly(found, result)
    assert len(found.plan.sums) == 9 and not found.host_rows
    assert sum(isinstance(i, Matmul) for i in found.program.code) > 20
