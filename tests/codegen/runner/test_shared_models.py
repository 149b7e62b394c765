"""Both runners on networks that no one here wrote, against onnxruntime; those without a library name their operator."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from codegen.runner.inputs import random_inputs
from codegen.runner.library import Library
from codegen.tvm_build import Binary, NoBinary, build
from tests.codegen.runner.conftest import ROOT, in_onnxruntime

MODELS = ROOT.parent / "shared" / "models"

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "resnet20_cifar10": {"x": (1, 3, 32, 32)},
    "resnet20_cifar10_qdq": {"x": (1, 3, 32, 32)},
    "resnet56_cifar10": {"x": (1, 3, 32, 32)},
    "squeezenet_v1.0_imagenet": {"x": (1, 3, 227, 227)},
    "ultraface_RFB-320": {},
    "fastestdet": {},
    "yunet_n_dynamic": {"input": (1, 3, 160, 160)},
    "dtln_2": {},
}
REFUSED = {"silero_vad": "LSTM"}
"""Networks that TVM does not take, with the operator that stops them."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODELS.is_dir(), reason="no shared models")]


def file(name: str) -> Path:
    path = MODELS / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_both_runners_give_what_onnxruntime_gives(name: str, runner: Path, tmp_path: Path) -> None:
    model, library = file(name), tmp_path / "model.so"
    binary = build(model, library, SHAPES[name], bind=True)
    assert isinstance(binary, Binary), binary
    loaded = Library(library)
    feeds = random_inputs(loaded.metadata, {}, seed=0)
    want = in_onnxruntime(model, feeds)
    made = loaded.run(feeds)
    words = []
    for index, (key, value) in enumerate(feeds.items()):
        np.save(tmp_path / f"in{index}.npy", value)
        words += ["--input", f"{key}={tmp_path / f'in{index}.npy'}"]
    command = [str(runner), str(library), *words, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert made.keys() == want.keys()
    for key, reference in want.items():
        scale = max(float(np.abs(reference).max()), 1.0)
        # a value that lies on a rounding step of int8 may fall to either side
        tolerance = 1e-4 * scale if not binary.coarse else 2e-2 * scale
        np.testing.assert_allclose(made[key], reference, rtol=0, atol=tolerance)
        written = np.load(tmp_path / f"{key.replace('/', '_')}.npy", allow_pickle=False)
        np.testing.assert_array_equal(written, made[key])


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_name_what_stopped_them(name: str, tmp_path: Path) -> None:
    model = file(name)
    shapes = {"input": (1, 576), "state": (2, 1, 128), "sr": ()}
    failed = build(model, tmp_path / "model.so", shapes)
    assert isinstance(failed, NoBinary), failed
    assert REFUSED[name] in failed.reason and "\n" not in failed.reason
    assert not (tmp_path / "model.so").exists()


def test_every_shared_network_is_on_one_of_the_lists() -> None:
    assert {path.stem for path in MODELS.glob("*.onnx")} <= SHAPES.keys() | REFUSED.keys()
