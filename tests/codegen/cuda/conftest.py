"""Small networks for a GPU, and one that is emulated."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from codegen.cuda_build import CudaBuild, build_cuda
from codegen.cuda_gpus import GPUS
from tests.codegen.cuda.emulator import build_driver
from tests.onnx_models import normal, onnx_model

SHAPES = {"x": (2, 3, 10, 10)}

BODY = """
small (float[N, 3, 10, 10] x) => (float[N, 5] probabilities, float[N, 8, 10, 10] map) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    r = Relu (c)
    d = Conv <strides = [2, 2], group = 8> (r, depthwise)
    a = Conv <pads = [0, 0, 0, 0]> (r, pointwise)
    map = Add (a, r)
    p = GlobalAveragePool (d)
    f = Flatten (p)
    g = Gemm (f, fc, fb)
    probabilities = Softmax <axis = 1> (g)
}
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with a full, a depthwise and a pointwise convolution, a reduction, a product and exponentials."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    weights = {
        "w": normal(8, 3, 3, 3),
        "b": normal(8),
        "depthwise": normal(8, 1, 3, 3),
        "pointwise": normal(8, 8, 1, 1),
        "fc": normal(8, 5),
        "fb": normal(5),
    }
    onnx.save(onnx_model(BODY, {name: np.asarray(value) for name, value in weights.items()}), path)
    return path


@pytest.fixture(scope="session")
def built(small: Path, tmp_path_factory: pytest.TempPathFactory) -> CudaBuild:
    """The network's files for an A100, by whatever compiler there is."""
    made = build_cuda(small, tmp_path_factory.mktemp("built"), "model.so", SHAPES, GPUS["a100"], plan="abc")
    assert isinstance(made, CudaBuild), made
    return made


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an emulated driver, which also takes the emulated kernels."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated driver with")
    folder = tmp_path_factory.mktemp("driver")
    build_driver(folder)
    return folder


@pytest.fixture
def emulated(driver: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Processes that are started from here on have the emulated GPU."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setenv("EMULATED_KERNELS", str(driver))
    return driver
