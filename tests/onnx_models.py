"""Small ONNX models out of their textual form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


def onnx_model(body: str, weights: Mapping[str, NDArray[Any]], opset: int = 17) -> onnx.ModelProto:
    """A checked model: ``body`` is a graph in onnx.parser's syntax, ``weights`` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {body}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def batchnorm_weights(channels: int, prefix: str = "", seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}gamma": rng.uniform(0.5, 2, channels).astype(np.float32),
        f"{prefix}beta": rng.standard_normal(channels).astype(np.float32),
        f"{prefix}mean": rng.standard_normal(channels).astype(np.float32),
        f"{prefix}var": rng.uniform(0.5, 2, channels).astype(np.float32),
    }
