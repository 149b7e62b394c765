from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import codegen.emission
from codegen.dataset import random_inputs
from codegen.emission import Emission, EmissionRequest, emit_host_library
from codegen.events import RecordingEvents
from codegen.tvm_build import Binary, NoBinary
from codegen.tvm_check import Difference
from passes.errors import VerificationError
from passes.graph import TensorSpec


def linear_model(path: Path, *, half: bool = False) -> Path:
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    weight = np.random.default_rng(0).standard_normal((12, 5)).astype(dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", 12])],
        [helper.make_tensor_value_info("y", kind, ["N", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def samples(*batches: int, dtype: type = np.float32) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((batch, 12)).astype(dtype)} for batch in batches]


def emit(folder: Path, events: RecordingEvents, given: list[dict[str, np.ndarray]], *, half: bool = False) -> Emission:
    model = linear_model(folder / "model.onnx", half=half)
    data = random_inputs([TensorSpec("x", "float32", (1, 12))], {}, 1, seed=0)
    return emit_host_library(EmissionRequest(model, folder, model, {"x": (1, 12)}, given, data, False, None, 0, events))


def test_a_library_is_emitted_with_its_check(tmp_path: Path) -> None:
    events = RecordingEvents()
    made = emit(tmp_path, events, samples(1, 4))
    assert made.artifacts == {"binary": "model.so"} and (tmp_path / "model.so").is_file()
    assert made.check is not None
    # 12 products summed in float32: 12 * 2**-24.
    assert made.check.relative_l2 < 7.2e-7 and made.check.samples == 2 and made.check.fresh_process
    assert list(events.timings) == ["compile", "check the binary"] and events.warnings == []


def test_half_precision_is_held_to_a_wider_limit(tmp_path: Path) -> None:
    made = emit(tmp_path, RecordingEvents(), samples(2, dtype=np.float16), half=True)
    assert made.check is not None and made.check.relative_l2 < codegen.emission.COARSE_RELATIVE_L2


def test_no_binary_is_a_warning_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen.emission, "build", lambda *_, **__: NoBinary("TVM cannot import LSTM 'rnn'"))
    events = RecordingEvents()
    assert emit(tmp_path, events, samples(1)) == Emission({"binary": None})
    assert events.warnings == ["no model.so: TVM cannot import LSTM 'rnn'"]


@pytest.mark.parametrize(("coarse", "kept"), [(False, False), (True, True)])
def test_a_library_that_computes_something_else_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coarse: bool, kept: bool
) -> None:
    def build(model: Path, library: Path, shapes: object, plan: str, child: object) -> Binary:
        library.write_bytes(b"")
        return Binary(library, ("x",), ("y",), {}, coarse)

    monkeypatch.setattr(codegen.emission, "build", build)
    monkeypatch.setattr(codegen.emission, "check_binary", lambda *_: Difference((0.01,), (0.5,), 1))
    events = RecordingEvents()
    made = emit(tmp_path, events, samples(1))
    assert ((tmp_path / "model.so").exists(), made.check is not None) == (kept, kept)
    line = "model.so differs from model.onnx in onnxruntime by 0.01 (relative L2), at most 0.001 was expected"
    assert events.warnings == ([] if kept else [f"no model.so: {line}"])


def test_samples_that_do_not_fit_a_bound_library_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Binary(tmp_path / "model.so", ("x",), ("y",), {"x": (3, 12)})
    seen = []

    def check(binary: Binary, model: Path, feeds: list[dict[str, np.ndarray]]) -> Difference:
        seen.append([feed["x"].shape for feed in feeds])
        return Difference((0.0,), (0.0,), len(feeds))

    monkeypatch.setattr(codegen.emission, "build", lambda *_, **__: bound)
    monkeypatch.setattr(codegen.emission, "check_binary", check)
    made = emit(tmp_path, RecordingEvents(), samples(1, 3))
    emit(tmp_path, RecordingEvents(), samples(1))
    assert seen == [[(3, 12)], [(3, 12)]]
    assert made.check is not None and made.check.bound_shapes == {"x": (3, 12)}


def test_a_crash_of_the_library_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> Difference:
        raise VerificationError("model.so, run in a fresh process, crashed (SIGILL)")

    monkeypatch.setattr(codegen.emission, "check_binary", crash)
    events = RecordingEvents()
    assert emit(tmp_path, events, samples(1)) == Emission({"binary": None})
    assert not (tmp_path / "model.so").exists()
    assert events.warnings == ["no model.so: model.so, run in a fresh process, crashed (SIGILL)"]
