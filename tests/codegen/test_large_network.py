"""A network that lies in files goes through the whole pipeline without being held in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo

from codegen import driver
from codegen.config import LowerConfig
from codegen.dataset import load
from codegen.onnx_runs import run_file
from passes.errors import VerificationError
from passes.onnx_graph import OnnxGraph

ROOT = Path(__file__).parents[2]
LAYER_BYTES = 8192 * 1024 * 4


def write_network(folder: Path, layers: int, wide: int, narrow: int) -> Path:
    """Gemms from ``narrow`` to ``wide`` channels and back, with ReLUs between, their weights in a file beside it.

    Singular values fall off, so that there is something to gain.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    falling = np.linspace(1, 0.02, narrow, dtype=np.float32) ** 2
    with (folder / "weights.bin").open("wb") as data:
        for i in range(layers):
            weight = rng.standard_normal((wide, narrow), np.float32) * falling / narrow**0.5
            weight = weight.T if i % 2 else weight
            tensor = TensorProto(name=f"w{i}", dims=weight.shape, data_type=1, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "weights.bin"), ("offset", data.tell()), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            data.write(np.ascontiguousarray(weight).tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("Gemm", [x, f"w{i}"], [f"y{i}"], f"fc{i}", transB=1))
            nodes.append(helper.make_node("Relu", [f"y{i}"], [f"r{i}"]))
            x = f"r{i}"
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
        for name, size in (("x", narrow), (x, narrow if layers % 2 == 0 else wide))
    ]
    graph = helper.make_graph(nodes, "gemms", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


MEASURE = """
import json, resource, sys
from dataclasses import replace
from codegen import driver
from codegen.config import LowerConfig
from codegen.emission import Emission
from codegen.events import QuietEvents

make = driver.parse_target
driver.parse_target = lambda text: replace(make(text), emit=lambda *_: Emission({"binary": None}))

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def lower(model, output):
    values = {"model": model, "output": output, "budgets": {"latency": "70%"}, "effort": "quick"}
    return driver.lower(LowerConfig.from_values(values), QuietEvents()).report

lower(sys.argv[1], sys.argv[2])
start = peak_bytes()
report = lower(sys.argv[3], sys.argv[4])
print(json.dumps({"held": peak_bytes() - start, "report": report}))
"""


@pytest.mark.slow
def test_memory_stays_far_below_the_network(tmp_path: Path) -> None:
    """320 MiB in ten layers: this process holds the largest one and a half times, and a fixed part of 160 MiB."""
    small = write_network(tmp_path / "small", 2, 64, 32)
    big = write_network(tmp_path / "big", 10, 8192, 1024)
    arguments = [small, tmp_path / "out_small", big, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["held"] < 1.5 * LAYER_BYTES + 160 * 2**20 < 10 * LAYER_BYTES
    report = told["report"]
    assert report["budgets"][0]["met"] and report["verification"]["reloaded"]
    changed = [layer for layer in report["layers"] if layer["choice"] != "dense"]
    assert changed
    # what the report says the outputs lose is what the written file loses, run by onnxruntime on other inputs
    (tmp_path / "big" / "weights.bin").rename(tmp_path / "big" / "moved.bin")
    written = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    outside = {ExternalDataInfo(t).location for t in written.graph.initializer if t.data_location}
    assert outside <= {"model.onnx.data"}
    x = np.random.default_rng(5).standard_normal((2, 1024)).astype(np.float32)
    (after,) = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"x": x})
    (tmp_path / "big" / "moved.bin").rename(tmp_path / "big" / "weights.bin")
    (before,) = onnxruntime.InferenceSession(big).run(None, {"x": x})
    error = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert 0.5 < error / report["output_error"]["relative_l2"] < 2


def test_a_run_apart_is_a_run(tmp_path: Path) -> None:
    model = write_network(tmp_path / "m", 2, 6, 4)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((n, 4)).astype(np.float32)} for n in (1, 3)]
    here, there = (run_file(model, feeds, apart=apart) for apart in (False, True))
    assert [[o.shape for o in run] for run in there] == [[(1, 4)], [(3, 4)]]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_a_run_apart_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, match=r"m\.onnx, run by onnxruntime in a fresh process, failed: .*"):
        run_file(tmp_path / "m.onnx", [], apart=True)


def test_the_run_key_covers_the_external_data(tmp_path: Path) -> None:
    """--resume must not go on with checkpoints of other weights."""
    model = write_network(tmp_path / "m", 2, 6, 4)
    config = LowerConfig.from_values({"model": model})

    def digests() -> dict[str, str]:
        return driver._digests(config, OnnxGraph.read(model), None, None)

    first = digests()
    assert first == digests() and set(first) == {"model", "model's weights.bin"}
    weights = np.fromfile(tmp_path / "m" / "weights.bin", np.float32)
    weights[3] += 1
    weights.tofile(tmp_path / "m" / "weights.bin")
    second = digests()
    assert [name for name in first if first[name] != second[name]] == ["model's weights.bin"]


def test_calibration_data_are_digested_as_they_were_read(tmp_path: Path) -> None:
    model = write_network(tmp_path / "m", 2, 6, 4)
    np.savez(tmp_path / "calib.npz", x=np.ones((5, 4), np.float32))
    graph = OnnxGraph.read(model)
    config = LowerConfig.from_values({"model": model, "calib": str(tmp_path / "calib.npz"), "samples": 3})
    data = load(str(tmp_path / "calib.npz"), graph.inputs, 3)
    (tmp_path / "calib.npz").unlink()  # nothing is read a second time
    assert driver._digests(config, graph, data, None)["calib"] == data.digest()
