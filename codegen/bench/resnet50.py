"""The ResNet-50 architecture that the onnx package carries without weights, filled with random ones."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.errors import InputError

Array = NDArray[Any]


def write_random(path: Path, seed: int) -> None:
    """Writes the network to ``path``, about 100 MB.

    In the architecture's file each weight is a ConstantOfShape of its shape. Convolutions are drawn as He et al. 2015
    do (variance 2 / fan-in); BatchNormalization scales by about 0.5, so that the sums over residual branches stay
    finite. Raises InputError where the onnx package does not have the file.
    """
    import onnx
    from onnx import numpy_helper

    source = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_resnet50.onnx"
    if not source.is_file():
        raise InputError(f"{source}: no such file: this version of the onnx package carries no ResNet-50")
    model = onnx.load(str(source))
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    readers = {name: (node.op_type, slot) for node in graph.node for slot, name in enumerate(node.input)}
    rng = np.random.default_rng(seed)
    filled, spent = [], set()
    for node in [n for n in graph.node if n.op_type == "ConstantOfShape"]:
        shape = tuple(int(size) for size in shapes[node.input[0]])
        value = _weight(*readers[node.output[0]], shape, rng)
        filled.append(numpy_helper.from_array(value.astype(np.float32), node.output[0]))
        spent.add(node.input[0])
        graph.node.remove(node)
    still_read = {name for node in graph.node for name in node.input}
    filled += [t for t in graph.initializer if t.name not in spent or t.name in still_read]
    del graph.initializer[:]
    graph.initializer.extend(filled)
    constants = {t.name for t in filled} | spent
    inputs = [i for i in graph.input if i.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _weight(op: str, slot: int, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if op == "Conv":
        fan_in = prod(shape[1:])
        return rng.normal(0, np.sqrt(2 / fan_in), shape) if len(shape) > 1 else np.zeros(shape)
    if op == "BatchNormalization":
        level = {1: 0.5, 2: 0.0, 3: 0.0, 4: 1.0}[slot]  # scale, shift, mean, variance
        return rng.normal(level, 0.05 if slot in (1, 2) else 0.0, shape)
    if op == "Gemm":
        return rng.normal(0, np.sqrt(1 / shape[-1]), shape)
    raise InputError(f"the onnx package's ResNet-50 has a weight of shape {shape} at input {slot} of a {op}")
