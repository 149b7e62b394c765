"""Files that cannot be used: one line, no traceback of a library, nothing else."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from passes.errors import InputError
from passes.onnx_graph import OnnxGraph
from tests.passes.onnx.exact import MODELS, model_of

RNG = np.random.default_rng(3)


def network(opset: int = 17) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    weights = {"w": RNG.standard_normal((5, 3, 3, 3)).astype(np.float32), "b": np.zeros(5, np.float32)}
    return model_of(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 5, 8, 8]}, weights, opset)


def external(folder: Path, name: str = "m.onnx") -> tuple[Path, onnx.ModelProto]:
    """The network with its weights in "weights.bin"; the message is returned with the data outside."""
    model = network()
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / name)
    return folder / name, onnx.load(folder / name, load_external_data=False)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        OnnxGraph.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert caught.value.exit_code == 4
    return message


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert "No such file" in refusal(path)
    assert "is a folder" in refusal(tmp_path)
    path.write_bytes(b"")
    assert "is empty" in refusal(path)
    for junk in (b"\x89PNG\r\n\x1a\n" * 40, b"hello world, I am no model\n", b"\x00" * 64):
        path.write_bytes(junk)
        assert "no ONNX" in refusal(path)
    path.write_bytes(onnx.ModelProto(ir_version=8, producer_name="x").SerializeToString())
    assert "holds no ONNX network" in refusal(path)


@pytest.mark.parametrize("name", ["net.pt", "weights.safetensors", "net"])
def test_files_of_other_frameworks(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04" + b"hello world, I am no model\n" * 9)
    assert "is no ONNX model; give an .onnx file, as torch.onnx.export writes it" in refusal(path)


def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(network(), path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("runs as a user who may read everything")
    assert "Permission denied" in refusal(path)


@pytest.mark.parametrize("opset", [1, 6, 27, 999])
def test_opsets_out_of_range(opset: int, tmp_path: Path) -> None:
    onnx.save(network(opset), tmp_path / "m.onnx")
    assert f"uses opset {opset}; supported are 7 to 26" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [7, 9, 13, 26])
def test_opsets_in_range(opset: int, tmp_path: Path) -> None:
    onnx.save(network(opset), tmp_path / "m.onnx")
    graph = OnnxGraph.read(tmp_path / "m.onnx")
    assert graph.run({"x": np.zeros((1, 3, 8, 8), np.float32)})[0].shape == (1, 5, 8, 8)


def test_ir_versions_and_missing_opset(tmp_path: Path) -> None:
    model = network()
    model.ir_version = 99
    onnx.save(model, tmp_path / "m.onnx")
    assert "IR version 99; supported are 3 to 13" in refusal(tmp_path / "m.onnx")
    model = network()
    del model.opset_import[:]
    onnx.save(model, tmp_path / "m.onnx")
    assert "names no opset" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["w", "b"])
def test_weights_that_are_no_numbers(where: str, value: float, tmp_path: Path) -> None:
    model = network()
    tensor = next(t for t in model.graph.initializer if t.name == where)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[-1] = value
    tensor.CopyFrom(numpy_helper.from_array(array, where))
    onnx.save(model, tmp_path / "m.onnx")
    message = refusal(tmp_path / "m.onnx")
    assert f"'{where}'" in message
    assert ("NaN" if np.isnan(value) else "infinity") in message


def test_infinity_that_is_no_weight_is_fine() -> None:
    model = network()
    model.graph.node[1].CopyFrom(helper.make_node("Max", ["h", "low"], ["y"], "mask"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-np.inf), "low"))
    assert len(OnnxGraph.from_model(model).sites().sites) == 1


def test_external_data_is_read(tmp_path: Path) -> None:
    path, _ = external(tmp_path / "a")
    graph = OnnxGraph.read(path)
    assert graph.to_text() == OnnxGraph.from_model(onnx.load(path)).to_text()


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    path, _ = external(tmp_path / "a")
    data = path.with_name("weights.bin")
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "which has" in refusal(path)
    data.unlink()
    assert "'weights.bin', which is missing" in refusal(path)
    data.mkdir()
    assert "which is missing" in refusal(path)


def _relocate(model: onnx.ModelProto, location: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


@pytest.mark.parametrize("kind", ["absolute", "parent", "hidden parent", "link", "linked folder", "empty"])
def test_external_data_outside_the_models_folder(kind: str, tmp_path: Path) -> None:
    path, model = external(tmp_path / "model")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights.bin").write_bytes(path.with_name("weights.bin").read_bytes())
    if kind == "link":
        path.with_name("weights.bin").unlink()
        path.with_name("weights.bin").symlink_to(outside / "weights.bin")
    if kind == "linked folder":
        (path.parent / "sub").symlink_to(outside)
    _relocate(
        model,
        {
            "absolute": str(outside / "weights.bin"),
            "parent": "../outside/weights.bin",
            "hidden parent": "sub/../../outside/weights.bin",
            "link": "weights.bin",
            "linked folder": "sub/weights.bin",
            "empty": "",
        }[kind],
    )
    path.write_bytes(model.SerializeToString())
    assert "outside the model's folder" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-4"), ("length", "12"), ("offset", "many"), ("offset", "9999999")]
)
def test_external_data_with_impossible_places(key: str, value: str, tmp_path: Path) -> None:
    path, model = external(tmp_path)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    path.write_bytes(model.SerializeToString())
    refusal(path)


def test_external_data_in_attributes(tmp_path: Path) -> None:
    model = network()
    constant = helper.make_node("Constant", [], ["w"], "stored", value=model.graph.initializer[0])
    constant.attribute[0].t.name = "value"
    model.graph.node.insert(0, constant)
    del model.graph.initializer[0]
    whole = OnnxGraph.from_model(model).to_text()
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0, convert_attribute=True)
    onnx.save(model, tmp_path / "m.onnx")
    graph = OnnxGraph.read(tmp_path / "m.onnx")
    (tmp_path / "weights.bin").rename(tmp_path / "moved")
    assert len(graph.sites().sites) == 1
    assert graph.model().graph.node[0].attribute[0].t.raw_data == constant.attribute[0].t.raw_data
    assert whole.count("\n") == graph.to_text().count("\n")
    assert "which is missing" in refusal(tmp_path / "m.onnx")


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _scramble(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(8):
        _flip(data, rng)
    return data


@pytest.mark.parametrize("damage", [_truncate, _flip, _scramble])
@pytest.mark.parametrize("name", ["resnet20_cifar10", "yunet_n_dynamic", "small"])
def test_damaged_files_work_or_give_one_line(
    name: str,
    damage: Callable[[bytearray, random.Random], bytearray],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A flipped bit may leave a valid model: then everything must go on; nothing but InputError may come out."""
    if name != "small" and not MODELS.is_dir():
        pytest.skip("the folder ../shared/models is absent")
    data = network().SerializeToString() if name == "small" else (MODELS / f"{name}.onnx").read_bytes()
    rng = random.Random(name)
    path = tmp_path / "m.onnx"
    outcomes = set()
    for _ in range(40):
        path.write_bytes(bytes(damage(bytearray(data), rng)))
        try:
            graph = OnnxGraph.read(path)
        except InputError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 600
            outcomes.add("refused")
            continue
        graph.sites(), graph.workload(), graph.affines(), graph.to_text()
        outcomes.add("read")
    assert "refused" in outcomes or damage is _flip
    assert capfd.readouterr() == ("", "")


def test_an_external_tensor_may_have_a_type_that_is_only_carried(tmp_path: Path) -> None:
    model = network()
    model.ir_version, model.opset_import[0].version = 10, 21
    model.graph.initializer.append(helper.make_tensor("h16", TensorProto.BFLOAT16, [4], [1.0, 2.0, 3.0, 4.0]))
    model.graph.node.append(helper.make_node("Identity", ["h16"], ["z"], "carried"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.BFLOAT16, [4]))
    model.graph.initializer[-1].raw_data = np.arange(4, dtype=np.uint16).tobytes()
    model.graph.initializer[-1].ClearField("int32_data")
    plain = OnnxGraph.from_model(model).to_text()
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, tmp_path / "m.onnx")
    assert OnnxGraph.read(tmp_path / "m.onnx").to_text() == plain
