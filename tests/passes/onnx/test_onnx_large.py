"""Networks with external data: streamed in and out, self-contained, and never whole in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from passes.core.reference import relative_l2
from passes.errors import InputError
from passes.onnx_graph import OnnxGraph
from tests.passes.onnx.exact import model_of, outer, run

ROOT = Path(__file__).parents[3]
SMALL = 1
"""A threshold that makes every network a large one."""


def write_layers(folder: Path, layers: int, width: int, dtype: Any = np.float32) -> Path:
    """A row of MatMuls with their weights in one data file, written piece by piece."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    with (folder / "weights.bin").open("wb") as data:
        for i in range(layers):
            array = (rng.standard_normal((width, width), np.float32) / width**0.5).astype(dtype)
            tensor = TensorProto(name=f"w{i}", dims=[width, width], data_type=kind, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "weights.bin"), ("offset", data.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            data.write(array.tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"h{i}"], f"fc{i}"))
            x = f"h{i}"
    model = model_of(nodes, {"x": ["N", width]}, {x: ["N", width]}, {}, dtype=kind)
    model.graph.initializer.extend(weights)
    model.metadata_props.add(key="origin", value="test")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_large_network_is_rewritten_and_self_contained(dtype: Any, tmp_path: Path) -> None:
    source = write_layers(tmp_path, 4, 600, dtype)
    x = np.random.default_rng(1).standard_normal((3, 600)).astype(dtype)
    (reference,) = run(onnx.load(source), {"x": x})
    graph = OnnxGraph.read(source, large_bytes=SMALL)
    for site in graph.sites().sites[:3]:
        graph.replace(site, outer(site.stage))
    graph.check()
    target = tmp_path / "out"
    target.mkdir()
    files = graph.save(target / "m.onnx", single_file_bytes=SMALL)
    assert files == (target / "m.onnx", target / "m.onnx.data")
    assert sorted(target.iterdir()) == sorted(files)
    (tmp_path / "weights.bin").unlink()
    light = onnx.load(target / "m.onnx", load_external_data=False)
    assert {ExternalDataInfo(t).location for t in light.graph.initializer} == {"m.onnx.data"}
    assert len(light.graph.initializer) == 7
    assert light.metadata_props[0].value == "test"
    onnx.checker.check_model(target / "m.onnx", full_check=True)
    (value,) = run(onnx.load(target / "m.onnx"), {"x": x})
    # three exact layers in a row: float32 factors, or half precision in weights and values between
    assert relative_l2(value, reference) < (1e-5 if dtype is np.float32 else 3 * 8 * np.finfo(dtype).eps)
    again = OnnxGraph.read(target / "m.onnx")
    assert len(again.sites().sites) == 7


def test_external_data_becomes_one_file_where_it_fits(tmp_path: Path) -> None:
    graph = OnnxGraph.read(write_layers(tmp_path, 3, 64), large_bytes=SMALL)
    (tmp_path / "out").mkdir()
    assert graph.save(tmp_path / "out" / "m.onnx") == (tmp_path / "out" / "m.onnx",)
    assert onnx.load(tmp_path / "out" / "m.onnx") == graph.model()
    (tmp_path / "m.onnx").unlink()


def test_the_streamed_file_is_the_message(tmp_path: Path) -> None:
    """Initializers of all sizes, so that lengths take one to four bytes; empty, scalar and opaque ones too."""
    rng = np.random.default_rng(2)
    weights = {f"w{n}": rng.standard_normal(n).astype(np.float32) for n in (0, 1, 25, 40, 5000, 600_000)}
    weights["scalar"] = np.asarray(2.0)
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights]
    model = model_of(nodes, {"x": [1]}, {}, weights, opset=21, ir_version=10)
    model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"b"]))
    model.graph.initializer.append(helper.make_tensor("int4", TensorProto.INT4, [3], [1, 2, 3]))
    model.graph.output.append(helper.make_tensor_value_info("w1_out", TensorProto.FLOAT, [1]))
    graph = OnnxGraph.from_model(model)
    graph.save(tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    assert written == graph.model()
    for tensor, source in zip(written.graph.initializer, model.graph.initializer, strict=True):
        assert tensor.name == source.name
        assert np.array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(source))


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OnnxGraph.read(write_layers(tmp_path, 3, 64), large_bytes=SMALL)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        graph.save(tmp_path / "nowhere" / "m.onnx")
    before = graph.save(target / "m.onnx")[0].read_bytes()

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("passes.onnx_weights.Weight.chunks", stop)
    for limit in (SMALL, 1 << 30):
        with pytest.raises(KeyboardInterrupt):
            graph.save(target / "m.onnx", single_file_bytes=limit)
        assert [path.name for path in target.iterdir()] == ["m.onnx"]
        assert (target / "m.onnx").read_bytes() == before


def test_the_input_file_may_be_overwritten(tmp_path: Path) -> None:
    source = write_layers(tmp_path, 3, 64)
    graph = OnnxGraph.read(source, large_bytes=SMALL)
    text = graph.to_text()
    graph.save(source)
    graph.save(tmp_path / "weights", single_file_bytes=SMALL)
    assert OnnxGraph.read(source).to_text() == OnnxGraph.read(tmp_path / "weights").to_text() == text


MEASURE = """
import resource, sys
import numpy as np
from passes.core.site import Chain, Stage
from passes.onnx_graph import OnnxGraph

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

OnnxGraph.read(sys.argv[1])
start = peak()
graph = OnnxGraph.read(sys.argv[2], large_bytes=1)
for site in graph.sites().sites:
    weight = site.stage.weight
    half = len(weight) // 2
    factors = np.ascontiguousarray(weight[:half]), np.ascontiguousarray(weight[:, :half])
    graph.replace(site, Chain(tuple(Stage(factor, None) for factor in factors), "cut", (half,)))
    del factors, weight
graph.check(), graph.workload(), graph.to_text()
graph.save(sys.argv[3], single_file_bytes=int(sys.argv[4]))
print(peak() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 1 << 31])
def test_memory_stays_far_below_the_network(limit: int, tmp_path: Path) -> None:
    """256 MiB in 16 layers: what is held at a time is a few layers and buffers, whatever their number."""
    for name, layers, width in (("small", 1, 16), ("big", 16, 2048)):
        (tmp_path / name).mkdir()
        write_layers(tmp_path / name, layers, width)
    arguments = [tmp_path / "small" / "m.onnx", tmp_path / "big" / "m.onnx", tmp_path / "out.onnx", limit]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    layer = 2048 * 2048 * 4
    # 1.5 x the largest tensor and a fixed part: two copy buffers of 16 MiB and the runtime's own
    assert int(done.stdout) < 1.5 * layer + 96 * 2**20 < 16 * layer
