import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import codegen.tvm_build
import codegen.tvm_versions
from codegen.child_process import Failure, call
from codegen.tvm_build import Binary, NoBinary, build
from codegen.tvm_check import Difference, check_binary, difference, run_binary
from codegen.tvm_versions import REQUIRED, check_tvm
from passes.errors import InputError, VerificationError


def conv_model(path: Path, *, scale: float = 1.0, batch: int | str = "N", weights_are_inputs: bool = False) -> Path:
    """Conv (strided, padded) -> Relu -> global mean -> Gemm, with seeded weights."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((6, 3, 3, 3)) * scale,
        "b": rng.standard_normal(6),
        "fc": rng.standard_normal((6, 5)),
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc"], ["y"], "fc"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])]
    if weights_are_inputs:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])], tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11 if weights_are_inputs else 17)])
    model.ir_version = 3 if weights_are_inputs else 8
    onnx.save(model, path)
    return path


def feeds(*batches: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((batch, 3, 8, 8)).astype(np.float32)} for batch in batches]


def in_onnxruntime(model: Path, given: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return [[np.asarray(out) for out in session.run(None, feed)] for feed in given]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Binary, Path]:
    folder = tmp_path_factory.mktemp("built")
    model = conv_model(folder / "model.onnx")
    binary = build(model, folder / "model.so", {"x": (1, 3, 8, 8)})
    assert isinstance(binary, Binary), binary
    return binary, model


def test_the_library_computes_the_network_for_any_batch(built: tuple[Binary, Path]) -> None:
    binary, model = built
    assert (binary.inputs, binary.outputs, binary.bound) == (("x",), ("y",), {})
    found = check_binary(binary, model, feeds(1, 3))
    assert found.samples == 2
    # Sums of at most 27 products in float32: 27 * 2**-24 is about 1.6e-6.
    assert found.relative_l2 < 1.6e-6


def test_the_comparison_sees_other_weights(built: tuple[Binary, Path], tmp_path: Path) -> None:
    binary, model = built
    other = conv_model(tmp_path / "other.onnx", scale=1.01)
    given = feeds(2)
    want, have = in_onnxruntime(other, given)[0][0], in_onnxruntime(model, given)[0][0]
    found = check_binary(binary, other, given)
    assert found.relative_l2 == pytest.approx(np.linalg.norm(have - want) / np.linalg.norm(want), rel=1e-3, abs=0)
    assert found.max_abs == pytest.approx(np.abs(have - want).max(), rel=1e-3, abs=0)
    assert not found.within(relative_l2=1e-4, max_abs=1e-4)


def test_old_networks_with_weights_as_inputs(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "old.onnx", batch=1, weights_are_inputs=True)
    binary = build(model, tmp_path / "old.so", {"x": (1, 3, 8, 8)})
    assert isinstance(binary, Binary), binary
    assert binary.inputs == ("x",)
    assert check_binary(binary, model, feeds(1)).relative_l2 < 1.6e-6


def one_node(path: Path, op: str, shape: list[int | str], out: list[int | str], **attributes: object) -> Path:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], "culprit", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def test_an_operator_that_tvm_lacks_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    model = one_node(tmp_path / "det.onnx", "Det", [3, 3], [])
    failed = build(model, tmp_path / "det.so", {"x": (3, 3)})
    assert isinstance(failed, NoBinary)
    assert failed.reason == "TVM cannot import Det 'culprit': its importer has no such operator"
    assert not (tmp_path / "det.so").exists()


def test_an_unreadable_network_is_a_reason_not_an_exception(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07garbage")
    failed = build(tmp_path / "bad.onnx", tmp_path / "bad.so", {})
    assert isinstance(failed, NoBinary)
    assert failed.reason.startswith("TVM's compiler failed: ")


def test_too_large_a_network_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_model(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").write_bytes(b"\0" * 100_000)
    monkeypatch.setattr(codegen.tvm_build, "_LIMIT_BYTES", 100_000)
    assert build(model, tmp_path / "m.so", {}) == NoBinary("the network has 0.00 GiB, TVM's importer takes up to 2 GiB")


def test_without_a_compiler_the_reason_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    assert build(conv_model(tmp_path / "m.onnx"), tmp_path / "m.so", {"x": (1, 3, 8, 8)}) == NoBinary(
        "no C++ compiler was found to link the library with: install g++ or set CXX"
    )


def test_a_broken_library_fails_the_verification(built: tuple[Binary, Path], tmp_path: Path) -> None:
    library = tmp_path / "model.so"
    library.write_bytes(built[0].library.read_bytes()[:1000])
    broken = Binary(library, ("x",), ("y",), {})
    with pytest.raises(VerificationError, match=r"^model\.so, run in a fresh process, (failed: |crashed \(SIG)"):
        run_binary(broken, feeds(1))


def test_a_crash_of_a_child_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text("import os\nprint('so far')\nimport sys; sys.stdout.flush()\nos.abort()\n")
    (tmp_path / "sleeping.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "silent.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    crashed = call("crashing", {})
    assert isinstance(crashed, Failure)
    assert (crashed.reason, crashed.log.splitlines()[0]) == ("crashed (SIGABRT)", "so far")
    assert call("sleeping", {}, timeout_s=0.5) == Failure("took longer than 0.5 s", "")
    assert call("silent", {}) == Failure("failed: no message", "")


ORPHAN = """
import sys, time
from codegen.child_process import end_with_parent
end_with_parent()
open(sys.argv[1], "w").close()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    parent_code = (
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', *sys.argv[1:]])\ntime.sleep(60)"
    )
    root = Path(codegen.tvm_build.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", parent_code, ORPHAN, str(ready)], cwd=root, stdout=subprocess.PIPE
    ) as parent:
        while not ready.exists():
            assert parent.poll() is None
            time.sleep(0.01)
        parent.kill()
        assert parent.stdout is not None
        # The child holds the other end of the pipe: it ends when the child does, long before its 60 seconds.
        assert parent.stdout.read() == b""


def test_the_difference_is_of_the_worst_output() -> None:
    reference = [[np.array([3.0, 4.0]), np.array([1e-9])], [np.array([0.0, 0.0]), np.array([0.0])]]
    result = [[np.array([3.0, 4.5]), np.array([2e-9])], [np.array([0.0, 0.0]), np.array([0.0])]]
    found = difference(result, reference)
    # ||(0, .5)|| / ||(3, 4)|| = .1; the second output is twice its reference, and both are nothing.
    assert found == Difference((0.1, 1.0), (0.5, 1e-9), 2)
    assert found.within(relative_l2=0.1, max_abs=1e-6) and not found.within(relative_l2=0.09, max_abs=1e-6)


def test_the_difference_refuses_what_cannot_be_compared() -> None:
    one = np.ones(2)
    for result, reference, line in [
        ([[one]], [[np.ones(3)]], r"output 0 of run 0 has shape \(2,\), expected \(3,\)"),
        ([[one * np.nan]], [[one]], "output 0 of run 0 is not finite"),
        ([[one]], [[one, one]], "run 0 has 1 outputs, expected 2"),
        ([], [], "0 results to compare with 0 references"),
    ]:
        with pytest.raises(VerificationError, match=line):
            difference(result, reference)


def test_the_pair_of_releases_is_checked_without_importing_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_tvm() == REQUIRED

    def other(package: str) -> str:
        return {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}[package]

    monkeypatch.setattr(codegen.tvm_versions, "version", other)
    with pytest.raises(InputError) as caught:
        check_tvm()
    assert str(caught.value) == (
        "apache-tvm-ffi 0.1.15.post2 is installed, but rankc runs with 0.1.14.post1 alone (other pairs crash): "
        "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1"
    )
