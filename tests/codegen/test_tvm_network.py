import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from codegen.cpu_device import device_for
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from codegen.tvm_build import Binary, NoBinary, build
from codegen.tvm_check import check_binary, run_binary
from codegen.tvm_network_flat import _planned, _Program, _Step, _Storage, _Value

Shape = tuple[int | str, ...]


class Network:
    """An ONNX model in the making, with seeded weights."""

    def __init__(self, *inputs: tuple[str, Shape]) -> None:
        self.rng = np.random.default_rng(0)
        self.inputs, self.nodes, self.tensors = list(inputs), [], []

    def weight(self, name: str, *shape: int) -> str:
        values = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)
        self.tensors.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def integers(self, name: str, *values: int) -> str:
        self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def conv(self, x: str, y: str, outs: int, ins: int, kernel: int, **attributes: object) -> str:
        w, b = self.weight(f"{y}/w", outs, ins, kernel, kernel), self.weight(f"{y}/b", outs)
        self.node("Conv", [x, w, b], y, pads=[kernel // 2] * 4, **attributes)
        return y

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{op}/{output}", **attributes))
        return output

    def save(self, path: Path, *outputs: str) -> Path:
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in self.inputs]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", inputs, results, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.save(model, path)
        return path


def built(model: Path, **options: object) -> Binary:
    binary = build(model, model.with_suffix(".so"), {"x": (1, 8, 12, 12)}, **options)  # type: ignore[arg-type]
    assert isinstance(binary, Binary), binary
    return binary


def feed(shape: tuple[int, ...] = (1, 8, 12, 12)) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def test_what_follows_a_convolution_is_in_its_loops_and_joins_are_in_place(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    net.node("Relu", [net.conv("x", "a", 8, 8, 3)], "ra")
    net.node("Relu", [net.node("Add", [net.conv("ra", "b", 8, 8, 3), "x"], "s")], "rb")
    halves = [net.conv("rb", name, 16, 8, kernel) for name, kernel in (("c", 1), ("d", 3))]
    net.conv(net.node("Concat", halves, "joined", axis=1), "y", 8, 32, 1)
    binary = built(net.save(tmp_path / "m.onnx", "y"))
    # five convolutions; the sum, the activations and the join are nowhere else
    assert [kernel.calls for kernel in binary.kernels] == [1] * 5
    assert all(kernel.workload for kernel in binary.kernels) and binary.notes == ()
    # sums of at most 72 products in float32, five of them in a row
    assert check_binary(binary, tmp_path / "m.onnx", [feed()]).relative_l2 < 5 * 72 * 2**-24


def test_pads_norms_and_constants_in_another_form_are_folded(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    net.node("Pad", ["x", net.integers("pads", 0, 0, 2, 0, 0, 0, 1, 1)], "padded")
    net.node("Conv", ["padded", net.weight("w", 8, 8, 3, 3)], "c")
    statistics = [net.weight(name, 8) for name in ("scale", "shift", "mean")]
    net.tensors.append(numpy_helper.from_array(np.linspace(0.5, 2, 8, dtype=np.float32), "variance"))
    net.node("Relu", [net.node("BatchNormalization", ["c", *statistics, "variance"], "n")], "r")
    net.node("Transpose", [net.weight("t", 8, 1, 1)], "turned", perm=[1, 2, 0])
    net.node("Add", ["r", net.node("Reshape", ["turned", net.integers("shape", 8, 1, 1)], "bias")], "y")
    model = net.save(tmp_path / "m.onnx", "y")
    binary = built(model)
    assert [(kernel.calls, bool(kernel.workload)) for kernel in binary.kernels] == [(1, True)]
    same_in_onnxruntime(binary, model)


def test_joins_that_cannot_be_in_place_are_computed(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    first, second = (net.conv("x", name, 8, 8, kernel) for name, kernel in (("a", 1), ("b", 3)))
    net.conv(net.node("Concat", [first, second], "rows", axis=2), "y0", 8, 8, 1)
    net.conv(net.node("Concat", [second, second], "twice", axis=1), "y1", 8, 16, 1)
    net.conv(net.node("Concat", [second, "x"], "of the input", axis=1), "y2", 8, 16, 1)
    net.conv(net.node("Concat", [first, second], "with a result", axis=1), "y3", 8, 16, 1)
    binary = built(net.save(tmp_path / "m.onnx", "y0", "y1", "y2", "y3", first))
    assert sum(kernel.calls for kernel in binary.kernels) == 6 + 4
    assert check_binary(binary, tmp_path / "m.onnx", [feed()]).relative_l2 < 1e-5


def same_in_onnxruntime(binary: Binary, model: Path) -> None:
    given = feed()
    want = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, given)
    for have, reference in zip(run_binary(binary, [given])[0], want, strict=True):
        assert have.dtype == np.asarray(reference).dtype
        np.testing.assert_allclose(have, reference, rtol=0, atol=1e-5)


def test_several_results_other_shapes_and_integers(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    net.node("Reshape", [net.conv("x", "a", 8, 8, 3), net.integers("shape", 8, 144)], "r")
    net.node("Gather", ["r", net.integers("rows", 5, 0, 2)], "g", axis=0)
    net.node("MatMul", ["g", net.weight("w", 144, 10)], "y")
    net.node("Softmax", ["y"], "z", axis=-1)
    net.node("Squeeze", [net.node("ReduceMean", ["r"], "mean", keepdims=1)], "scalar")
    # tensors that are joined, and what they are joined to, joined again
    net.conv(
        net.node("Concat", [net.conv("x", "b", 8, 8, 3), net.conv("x", "c", 8, 8, 1)], "bc", axis=1), "d", 8, 16, 1
    )
    net.conv(net.node("Concat", ["bc", "d"], "bcd", axis=1), "e", 4, 24, 3)
    model = net.save(tmp_path / "m.onnx", "z", "a", "y", "scalar", "e")
    binary = built(model)
    same_in_onnxruntime(binary, model)
    assert not binary.notes and not any("concat" in kernel.name for kernel in binary.kernels)


def test_a_network_without_weights_and_of_several_types(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    net.node("Cast", [net.node("ArgMax", ["x"], "index", axis=1)], "real", to=TensorProto.FLOAT)
    net.node("Where", [net.node("Greater", ["x", "real"], "more"), "x", "real"], "chosen")
    net.node("Mul", [net.node("Cast", ["chosen"], "half", to=TensorProto.FLOAT16), "half"], "squares")
    net.node("Cast", [net.node("MaxPool", ["squares"], "pooled", kernel_shape=[2, 2])], "y", to=TensorProto.FLOAT)
    net.nodes.append(helper.make_node("Split", ["x"], ["upper", "lower"], axis=1))
    net.node("Concat", ["lower", net.node("Relu", ["upper"], "positive")], "z", axis=1)
    # the same memory as two matrices
    net.node("Reshape", ["z", net.integers("wide", 8, 144)], "zw")
    net.node("MatMul", ["zw", net.node("Reshape", ["z", net.integers("high", 144, 8)], "zh")], "product")
    model = net.save(tmp_path / "m.onnx", "y", "z", "product")
    binary = built(model)
    same_in_onnxruntime(binary, model)
    assert not binary.notes


def test_operators_that_the_importer_lacks_are_written_otherwise(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    net.node("Celu", [net.conv("x", "a", 8, 8, 3)], "c", alpha=0.5)
    net.node("Reshape", ["c", net.integers("sequence", 8, 1, 144)], "s")
    net.node("LSTM", ["s", net.weight("w", 1, 24, 144), net.weight("r", 1, 24, 6)], "y", hidden_size=6)
    model = net.save(tmp_path / "m.onnx", "y")
    binary = built(model)
    assert binary.notes == ()
    assert check_binary(binary, model, [feed()]).relative_l2 < 1e-5


def test_a_result_that_no_kernel_computes_is_left_to_the_virtual_machine(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    net.node("Relu", ["x"], "y")
    net.node("Identity", ["x"], "z")
    model = net.save(tmp_path / "m.onnx", "y", "z")
    binary = built(model)
    assert [note.startswith("operators are called by Relax's virtual machine") for note in binary.notes] == [True]
    assert check_binary(binary, model, [feed()]).relative_l2 == 0.0


def test_symbolic_shapes_are_kept_or_bound(tmp_path: Path) -> None:
    net = Network(("x", ("N", 8, 12, 12)))
    model = net.save(tmp_path / "m.onnx", net.conv("x", "y", 8, 8, 3))
    kept = built(model)
    assert kept.bound == {} and kept.workloads == ()
    assert check_binary(kept, model, [feed(), feed((3, 8, 12, 12))]).relative_l2 < 1e-5
    bound = built(model, bind=True)
    assert bound.bound == {"x": (1, 8, 12, 12)} and len(bound.workloads) == 1
    assert check_binary(bound, model, [feed()]).relative_l2 < 1e-5


def test_layers_are_built_with_the_schedules_that_were_asked_for(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    last = "x"
    for name in ("a", "b"):
        last = net.node("Relu", [net.conv(last, name, 8, 8, 3)], f"r{name}")
    net.conv(last, "y", 4, 8, 1)
    model = net.save(tmp_path / "m.onnx", "y")
    first, second = built(model).workloads
    assert (first.count, second.count) == (2, 1) and not first.tuned and not second.tuned
    assert Workload.parse(first.key).work.macs == 8 * 8 * 9 * 144  # products of the layer, by hand
    other = Schedule.of(first.schedule.template, **{**dict(first.schedule.params), "oc": 8})
    assert other != first.schedule
    binary = built(model, schedules={first.key: other})
    assert [(used.schedule, used.tuned) for used in binary.workloads] == [(other, True), (second.schedule, False)]
    assert check_binary(binary, model, [feed()]).relative_l2 < 1e-5


LINKER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -o) out="$2"; shift;; *.o) object="${object:-$1}";; esac
  shift
done
cp "$object" "$out"
"""


def machine_of(path: Path) -> int:
    """e_machine of an ELF file."""
    return int.from_bytes(path.read_bytes()[18:20], "little")


def test_objects_for_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The linker keeps the first object: what TVM generated can be looked at where there is no cross compiler.
    script = tmp_path / "linker"
    script.write_text(LINKER)
    script.chmod(0o755)
    net = Network(("x", (1, 8, 12, 12)))
    model = net.save(tmp_path / "m.onnx", net.conv("x", "y", 8, 8, 3))
    device = device_for({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"})
    monkeypatch.setenv("CXX_aarch64_linux_gnu", str(script))
    binary = built(model, device=device)
    assert machine_of(binary.library) == 183  # EM_AARCH64


def test_a_library_for_another_architecture_is_linked(tmp_path: Path) -> None:
    triple = "aarch64-linux-gnu"
    if f"CXX_{triple.replace('-', '_')}" not in os.environ and shutil.which(f"{triple}-g++") is None:
        pytest.skip("there is no aarch64-linux-gnu-g++")
    net = Network(("x", (1, 8, 12, 12)))
    model = net.save(tmp_path / "m.onnx", net.conv("x", "y", 8, 8, 3))
    binary = built(model, device=device_for({"mtriple": triple, "mcpu": "cortex-a72"}))
    assert machine_of(binary.library) == 183


def test_without_a_cross_compiler_the_reason_says_what_to_install(tmp_path: Path) -> None:
    net = Network(("x", (1, 8, 12, 12)))
    model = net.save(tmp_path / "m.onnx", net.conv("x", "y", 8, 8, 3))
    device = device_for({"mtriple": "riscv64-unknown-linux-musl", "mcpu": "sifive-x280"})
    assert build(model, tmp_path / "m.so", {}, device=device) == NoBinary(
        "no cross compiler for riscv64-unknown-linux-musl was found: install riscv64-linux-musl-g++ or set "
        "CXX_riscv64_unknown_linux_musl"
    )


def test_tensors_that_live_at_the_same_time_do_not_overlap() -> None:
    rng = np.random.default_rng(3)
    values = [_Value(_Storage("float32", int(rng.integers(1, 200))), (), f"v{i}") for i in range(40)]
    program = _Program()
    for index, value in enumerate(values):
        inputs = [values[int(i)] for i in rng.integers(max(0, index - 6), index, 2)] if index else []
        program.steps.append(_Step(f"k{index}", inputs, [value], None))
    places, sizes = _planned(program, {})
    last = {value.storage: index for index, value in enumerate(values)}
    for index, step in enumerate(program.steps):
        last.update({value.storage: index for value in step.inputs})
    for first, one in enumerate(values):
        assert places[one.storage] % 16 == 0  # 64 bytes
        assert places[one.storage] + one.storage.size <= sizes["float32"]
        for second, other in enumerate(values[:first]):
            if last[other.storage] >= first:  # the older one is still read when the younger one is written
                assert (
                    places[one.storage] >= places[other.storage] + other.storage.size
                    or places[other.storage] >= places[one.storage] + one.storage.size
                ), (first, second)
    assert sizes["float32"] < sum(value.storage.size for value in values)
