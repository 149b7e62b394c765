"""Libraries and the C++ runner, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from codegen import onnx_runs
from codegen.runner.build import build_runner
from codegen.tvm_build import Binary, build

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "examples" / "digits.onnx"

DTYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")


def in_onnxruntime(model: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    session = onnx_runs.session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example network's library, its batch symbolic."""
    library = tmp_path_factory.mktemp("digits") / "model.so"
    binary = build(DIGITS, library, {"image": (1, 1, 16, 16)}, plan="abc123")
    assert isinstance(binary, Binary), binary
    return library


@pytest.fixture(scope="session")
def types(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network that swaps the axes of one input of each type, and its library."""
    folder = tmp_path_factory.mktemp("types")
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in DTYPES}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Transpose", [f"in/{n}"], [f"out/{n}"], perm=[1, 0]) for n in DTYPES],
        "types",
        [onnx.helper.make_tensor_value_info(f"in/{n}", kind, ["rows", 3]) for n, kind in kinds.items()],
        [onnx.helper.make_tensor_value_info(f"out/{n}", kind, [3, "rows"]) for n, kind in kinds.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "types.onnx")
    binary = build(folder / "types.onnx", folder / "types.so", {f"in/{name}": (2, 3) for name in DTYPES})
    assert isinstance(binary, Binary), binary
    return folder / "types.onnx", folder / "types.so"


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ runner, its libraries beside it."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the runner with")
    return build_runner(tmp_path_factory.mktemp("runner"), options=("-O0", "-Wall", "-Wextra", "-Werror"))
