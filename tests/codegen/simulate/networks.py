"""Networks for simulations: the example, a Tucker-2 chain, one that needs the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.onnx_models import normal, onnx_model

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "examples" / "digits.onnx"


def write_chain(path: Path, channels: int, rank: int, size: int, outputs: tuple[str, ...] = ("y",)) -> Path:
    """A 3x3 convolution as 1x1 to ``rank``, 3x3, 1x1; ``outputs`` may name the maps between as well: a, b."""
    shapes = {"a": rank, "b": rank, "y": channels}
    results = ", ".join(f"float[1,{shapes[name]},{size},{size}] {name}" for name in outputs)
    model = onnx_model(
        f"""g (float[1,{channels},{size},{size}] x) => ({results}) {{
            a = Conv <kernel_shape=[1,1]> (x, w1)
            b = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (a, w2)
            y = Conv <kernel_shape=[1,1]> (b, w3, b3)
        }}""",
        {
            "w1": normal(rank, channels, 1, 1),
            "w2": normal(rank, rank, 3, 3),
            "w3": normal(channels, rank, 1, 1),
            "b3": normal(channels),
        },
    )
    onnx.save(model, path)
    return path


def write_softmax(path: Path, batch: str = "1") -> Path:
    """A convolution and a softmax over its channels, which the machine has no instruction for."""
    model = onnx_model(
        f"""g (float[{batch},4,8,8] x) => (float[{batch},6,8,8] y) {{
            a = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, w)
            s = Softmax <axis=1> (a)
            y = Conv <kernel_shape=[1,1]> (s, v)
        }}""",
        {"w": normal(6, 4, 3, 3), "v": normal(6, 6, 1, 1)},
    )
    onnx.save(model, path)
    return path


def counted_macs(path: Path) -> int:
    """Multiply-adds of all convolutions and linear layers of a network with plain shapes, from its file alone."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    values = [*model.graph.value_info, *model.graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
    macs = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            macs += int(np.prod(weights[node.input[1]]) * np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "Gemm":
            macs += int(np.prod(weights[node.input[1]]))
    return macs


def images(count: int, seed: int = 3) -> np.ndarray:
    """Inputs of the digits' network."""
    return np.random.default_rng(seed).uniform(0, 1, (count, 1, 16, 16)).astype(np.float32)
