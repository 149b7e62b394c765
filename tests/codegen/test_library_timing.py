from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from codegen.library_timing import Contender, profile, time_library, time_side_by_side, time_together
from codegen.tvm_build import Binary, build
from codegen.tvm_time_child import pin
from passes.errors import VerificationError

SHAPE = (1, 8, 16, 16)


def convs(path: Path, count: int) -> Path:
    """``count`` different convolutions of one shape with a ReLU behind each."""
    rng = np.random.default_rng(count)
    tensors = [
        numpy_helper.from_array(rng.standard_normal((8, 8, 3, 3)).astype(np.float32) / 6, f"w{i}") for i in range(count)
    ]
    nodes, last = [], "x"
    for i in range(count):
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last = f"r{i}"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("x", last)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:], tensors), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Binary]:
    folder = tmp_path_factory.mktemp("timed")
    model = convs(folder / "model.onnx", 4)
    binary = build(model, folder / "model.so", {})
    assert isinstance(binary, Binary), binary
    return model, binary


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)}


def test_contenders_take_turns_and_compute_the_same(network: tuple[Path, Binary], feeds: dict[str, np.ndarray]) -> None:
    model, binary = network
    library, reference = time_together(
        [Contender.of("library", binary, feeds), Contender("onnxruntime", model, feeds)], blocks=3, calls=5
    )
    assert (library.name, reference.name) == ("library", "onnxruntime")
    for samples in (library, reference):
        assert samples.seconds.shape == (3, 5)
        assert np.isfinite(samples.seconds).all() and (samples.seconds > 0).all()
    want = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, feeds)
    np.testing.assert_allclose(reference.outputs[0], want[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(library.outputs[0], want[0], rtol=0, atol=1e-5)


def test_a_library_alone_and_side_by_side(network: tuple[Path, Binary], feeds: dict[str, np.ndarray]) -> None:
    model, binary = network
    assert len(time_library(binary.library, feeds, 7)) == 7
    found = time_side_by_side({"a": binary.library, "b": binary.library}, {"o": model}, feeds, budget_s=0.05)
    assert list(found) == ["a", "b", "o"]
    assert len({values.shape for values in found.values()}) == 1 and found["a"].shape[0] >= 8


def test_the_profile_has_the_kernels_and_their_calls(network: tuple[Path, Binary]) -> None:
    _, binary = network
    found = profile(binary, repeats=6)
    # four convolutions of one shape are one function, called with four weights
    assert [times.kernel for times in found] == list(binary.kernels)
    (times,) = found
    assert times.kernel.calls == 4 and len(times.seconds) == 6
    assert times.kernel.workload == "conv 1x8x16x16 -> 8, kernel 3x3, pads 1,1,1,1, float32"
    assert times.total_s == pytest.approx(4 * min(times.seconds), rel=1e-12, abs=0)


def test_what_cannot_be_run_is_one_line(
    network: tuple[Path, Binary], feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(VerificationError, match="what was to be timed in a fresh process failed: "):
        time_library(tmp_path / "broken.so", feeds, 1)
    with pytest.raises(ValueError, match="a contender, a block and a call"):
        time_together([], blocks=1, calls=1)


def test_a_process_is_pinned_to_as_many_processors_as_it_has_threads() -> None:
    import os

    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system pins no process")
    allowed = os.sched_getaffinity(0)
    try:
        pin(1)
        assert len(os.sched_getaffinity(0)) == 1 and os.sched_getaffinity(0) <= allowed
    finally:
        os.sched_setaffinity(0, allowed)
    pin(len(allowed))
    assert os.sched_getaffinity(0) == allowed
