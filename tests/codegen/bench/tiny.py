"""Folders laid out like those of the benchmarks, with a network of seconds and images of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def write_network(path: Path) -> None:
    """Six 3x3 convolutions of 16 to 32 channels with ReLUs, a global average, a linear layer to 10 classes."""
    rng = np.random.default_rng(0)
    nodes, constants = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    tensor, channels = "x", 3
    for index, (width, stride) in enumerate([(16, 2), (16, 1), (32, 2), (32, 1), (32, 1), (32, 1)]):
        weight = rng.normal(size=(width, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        names = [tensor, constant(f"w{index}", weight), constant(f"b{index}", 0.1 * rng.normal(size=width))]
        strides, pads = [stride, stride], [1, 1, 1, 1]
        nodes.append(helper.make_node("Conv", names, [f"c{index}"], f"conv{index}", strides=strides, pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"))
        tensor, channels = f"r{index}", width
    nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    head = [constant("wh", rng.normal(size=(10, channels))), constant("bh", np.zeros(10))]
    nodes.append(helper.make_node("Gemm", ["flat", *head], ["y"], "head", transB=1))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_folders(folder: Path, calibration: int, test: int) -> tuple[Path, Path]:
    """Folders of models and data; the labels are what the network itself predicts."""
    models, data = folder / "models", folder / "data"
    (data / "cifar10").mkdir(parents=True)
    models.mkdir()
    path = models / "resnet20_cifar10.onnx"
    write_network(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    for name, count in (("train_0.npz", calibration), ("test.npz", test)):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        scaled = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
        labels = session.run(None, {"x": scaled})[0].argmax(1).astype(np.uint8)
        np.savez(data / "cifar10" / name, x=pixels, y=labels, lossless=np.ones(count, bool))
    return models, data
