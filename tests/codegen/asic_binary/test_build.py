"""model.so around external programs, with a driver in C that is no simulator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import codegen.asic_binary
from codegen.asic_binary.build import build
from codegen.asic_binary.host_graph import NODE, host_graph
from codegen.asic_binary.segments import Segment, cut
from codegen.child_process import _ROOT
from codegen.quantized.graph import QHost, QTable, QTensor, QuantizedGraph
from codegen.runner.metadata import read_metadata
from codegen.tvm_build import Binary, NoBinary

HEADERS = Path(codegen.asic_binary.__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile a driver with")


def _softmax() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["in"], ["out"], axis=1)],
        "softmax",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 6])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def _network() -> QuantizedGraph:
    """x + 3 (accelerator), softmax (host), + 5 (accelerator)."""
    tensors = {
        "x": QTensor("x", (1, 6), 0.25, 1, True),
        "a": QTensor("a", (1, 6), 0.25, 1, True),
        "p": QTensor("p", (1, 6), 1 / 256, -128, True),
        "y": QTensor("y", (1, 6), 1 / 256, -128, True),
    }

    def table(shift: int) -> bytes:
        return bytes((i + shift) % 256 for i in range(256))

    operations = (
        QTable("first", "Table", "x", "a", table(3)),
        QHost("softmax", "Softmax", ("a",), ("p",), "no integer operation", _softmax()),
        QTable("second", "Table", "p", "y", table(5)),
    )
    return QuantizedGraph(tensors, operations, ("x",), ("y",), (True,), (True,), ("x",), ("y",))


def test_a_host_operation_cuts_the_network_in_two() -> None:
    parts = cut(_network()).parts
    assert [type(part) for part in parts] == [Segment, QHost, Segment]
    first, last = (part.graph for part in parts if isinstance(part, Segment))
    assert (first.inputs, first.outputs) == (("x",), ("a",))
    assert (last.inputs, last.outputs) == (("p",), ("y",))


def test_a_side_branch_does_not_cut() -> None:
    network = _network()
    tensors = dict(network.tensors, b=QTensor("b", (1, 6), 0.25, 1, True), c=QTensor("c", (1, 6), 0.25, 1, True))
    aside = (QTable("aside", "Table", "a", "b", bytes(256)), QTable("further", "Table", "b", "c", bytes(256)))
    graph = QuantizedGraph(
        tensors, (*network.operations, *aside), ("x",), ("y", "c"), (True,), (True, False), ("x",), ("y", "c")
    )
    segments = cut(graph).segments
    assert [[op.name for op in s.graph.operations] for s in segments] == [["first", "aside", "further"], ["second"]]
    assert segments[0].graph.outputs == ("a", "c")


def test_the_host_graph_is_valid_onnx_with_a_node_per_segment() -> None:
    model = host_graph(cut(_network()), "net")
    assert [node.op_type for node in model.graph.node] == [
        *("QuantizeLinear", NODE, "DequantizeLinear", "Softmax", "QuantizeLinear", NODE, "DequantizeLinear")
    ]
    onnx.checker.check_model(model)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Binary:
    path = tmp_path_factory.mktemp("library") / "model.so"
    made = build(cut(_network()), [b"\x03", b"\x05"], path)
    assert isinstance(made, Binary), made
    return made


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "echo.so"
    command = ["g++", "-shared", "-fPIC", f"-I{HEADERS}", str(Path(__file__).with_name("echo_driver.cc")), "-o"]
    subprocess.run([*command, str(path)], check=True)
    return path


_CHILD = """
import ctypes, json, os, sys
sys.modules.setdefault("torch", None)
import numpy as np, tvm
from tvm.runtime.vm import VirtualMachine
machine = VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
library = ctypes.CDLL(sys.argv[1])
library.rankc_cycles.restype = ctypes.c_int64
if "SET_DRIVER" in os.environ:
    driver = ctypes.CDLL(os.environ["SET_DRIVER"])
    driver.rankc_driver_get.restype = ctypes.c_void_p
    library.rankc_set_driver.argtypes = (ctypes.c_void_p,)
    library.rankc_set_driver(driver.rankc_driver_get())
x = np.array(json.loads(sys.argv[2]), np.float32)
out = [machine["main"](tvm.runtime.tensor(x)).numpy().tolist() for _ in range(2)]
print(json.dumps([out, library.rankc_cycles()]))
"""


def _run(library: Path, x: np.ndarray, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = {"TVM_USE_RUNTIME_LIB": "1", "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1", "PYTHONPATH": str(_ROOT)}
    return subprocess.run(
        [sys.executable, "-c", _CHILD, str(library), json.dumps(x.tolist())],
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _expected(x: np.ndarray) -> np.ndarray:
    a = np.clip(np.rint(x / np.float32(0.25)) + 1, -128, 127) + 3
    session = onnxruntime.InferenceSession(_softmax(), providers=["CPUExecutionProvider"])
    p = session.run(None, {"in": ((a - 1) * 0.25).astype(np.float32)})[0]
    return (np.clip(np.rint(p * 256) - 128, -128, 127) + 5 + 128) / 256


@needs_compiler
def test_a_driver_of_ones_own_runs_the_programs(library: Binary, echo: Path) -> None:
    x = np.linspace(-2, 2, 6, dtype=np.float32)[None]
    done = _run(library.library, x, RANKC_DRIVER=str(echo))
    assert done.returncode == 0, done.stderr
    outputs, cycles = json.loads(done.stdout)
    np.testing.assert_allclose(outputs[0], _expected(x), rtol=0, atol=1.01 / 256)
    assert outputs[0] == outputs[1]
    assert cycles == 2 * (6 + 6)


def test_the_library_says_what_it_takes_and_gives(library: Binary) -> None:
    found = read_metadata(library.library)
    assert [info.text for info in (*found.inputs, *found.outputs)] == ["x: float32[1, 6]", "y: float32[1, 6]"]
    assert found.target["kind"] == "llvm" and found.device.endswith(" and an accelerator")


def test_without_a_driver_the_error_says_what_to_do(library: Binary) -> None:
    done = _run(library.library, np.zeros((1, 6), np.float32))
    assert done.returncode != 0
    assert "no driver for the accelerator: set RANKC_DRIVER" in done.stderr


@needs_compiler
def test_what_the_driver_refuses_is_reported(tmp_path: Path, echo: Path) -> None:
    made = build(cut(_network()), [b"\x03\x04", b"\x05"], tmp_path / "model.so")
    assert isinstance(made, Binary)
    done = _run(made.library, np.zeros((1, 6), np.float32), RANKC_DRIVER=str(echo))
    assert done.returncode != 0
    assert "segment 0 is refused by the driver: the program must be one byte" in done.stderr


def test_a_driver_that_is_none(library: Binary, tmp_path: Path) -> None:
    done = _run(library.library, np.zeros((1, 6), np.float32), RANKC_DRIVER=str(tmp_path / "missing.so"))
    assert done.returncode != 0
    assert "RANKC_DRIVER cannot be loaded" in done.stderr


@needs_compiler
def test_the_driver_can_be_set_by_the_process(library: Binary, echo: Path) -> None:
    x = np.linspace(-2, 2, 6, dtype=np.float32)[None]
    done = _run(library.library, x, SET_DRIVER=str(echo))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1] == 2 * (6 + 6)


def test_one_program_per_segment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 programs for 2 segments"):
        build(cut(_network()), [b""], tmp_path / "model.so")


def test_what_tvm_cannot_import_is_named(tmp_path: Path) -> None:
    network = _network()
    host = network.operations[1]
    assert isinstance(host, QHost)
    model = onnx.load_from_string(host.model)
    model.graph.node[0].op_type = "NoSuchOperator"
    bad = QHost(host.name, "NoSuchOperator", host.inputs, host.outputs, host.reason, model.SerializeToString())
    graph = QuantizedGraph(
        network.tensors,
        (network.operations[0], bad, network.operations[2]),
        ("x",),
        ("y",),
        (True,),
        (True,),
        ("x",),
        ("y",),
    )
    made = build(cut(graph), [b"\x03", b"\x05"], tmp_path / "model.so")
    assert isinstance(made, NoBinary)
    assert "NoSuchOperator" in made.reason
    assert not (tmp_path / "model.so").exists()
