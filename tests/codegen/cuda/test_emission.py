"""The target cuda: estimates where there is no GPU, measurements where there is one (an emulated one)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import codegen.cuda_emission
import codegen.cuda_target
from codegen.cli import main
from codegen.cuda_build import CudaBuild, build_cuda
from codegen.cuda_driver import FoundGpu
from codegen.cuda_emission import CudaEmitter
from codegen.cuda_gpus import GPUS, Gpu
from codegen.dataset import random_inputs
from codegen.emission import EmissionRequest
from codegen.events import RecordingEvents
from codegen.runner.metadata import read_metadata
from codegen.target import parse_target
from codegen.tvm_build import NoBinary
from passes.core.cost import Kind
from passes.errors import UnsupportedError, UsageError
from passes.graph import TensorSpec
from tests.codegen.cuda.emulator import build_kernels

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (2, 3, 10, 10)
ARTIFACTS = {"binary": "model.so", "cuda_source": "model.cu", "ptx": "model.ptx"}


def request(model: Path, folder: Path, events: RecordingEvents) -> EmissionRequest:
    data = random_inputs([TensorSpec("x", "float32", SHAPE)], {}, 1, seed=0)
    samples = [{"x": np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)}]
    return EmissionRequest(model, folder, model, {"x": SHAPE}, samples, data, False, None, 0, events)


def test_without_a_gpu_nothing_is_measured_and_a_warning_says_so(
    small: Path, built: CudaBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(model: Path, folder: Path, *_: object, plan: str) -> CudaBuild:
        shutil.copytree(built.binary.library.parent, folder, dirs_exist_ok=True)
        return built

    monkeypatch.setattr(codegen.cuda_emission, "build_cuda", build)
    emitter, events = CudaEmitter(GPUS["a100"], "no driver of NVIDIA"), RecordingEvents()
    assert emitter.baseline(small, {"x": SHAPE}, 0, events) is None
    made = emitter(request(small, tmp_path, events))
    assert made.artifacts == ARTIFACTS and all((tmp_path / name).is_file() for name in ARTIFACTS.values())
    assert (made.cost, made.baseline, made.comparison, made.check) == (None, None, None, None)
    assert events.warnings == [
        "model.so was not run: this machine has no driver of NVIDIA; latencies are estimates for A100 SXM4 80GB"
    ]


def test_an_older_gpu_is_no_gpu(small: Path) -> None:
    emitter = CudaEmitter(GPUS["h100"], FoundGpu("Old", "sm_80"))
    assert emitter.baseline(small, {"x": SHAPE}, 0, RecordingEvents()) is None


@pytest.mark.slow  # compiles two libraries, and their kernels for the emulated GPU
def test_with_a_gpu_the_library_is_checked_and_timed_beside_the_input(
    small: Path, tmp_path: Path, emulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(
        model: Path, folder: Path, library: str, shapes: Mapping[str, Any], gpu: Gpu, plan: str
    ) -> CudaBuild | NoBinary:
        made = build_cuda(model, folder, library, shapes, gpu, plan=plan)
        build_kernels(folder / "model.cu", folder / "model.ptx", emulated)
        return made

    monkeypatch.setattr(codegen.cuda_emission, "build_cuda", build)
    monkeypatch.setattr(codegen.cuda_emission, "BLOCKS", 6)
    monkeypatch.setattr(codegen.cuda_emission, "CALLS", 1)
    emitter, events = CudaEmitter(GPUS["a100"], FoundGpu("Emulated GPU", "sm_80")), RecordingEvents()
    before = emitter.baseline(small, {"x": SHAPE}, 0, events)
    assert before is not None and before.kind is Kind.MEASURED and before.unit == "s" and before.latency > 0
    made = emitter(request(small, tmp_path, events))
    emitter.close()
    assert made.artifacts == ARTIFACTS and events.warnings == []
    assert made.check is not None and made.check.relative_l2 < 1e-6 and made.check.fresh_process
    assert made.cost is not None and made.cost.kind is Kind.MEASURED
    assert made.baseline is not None and made.comparison is not None
    assert made.comparison.low <= made.comparison.value <= made.comparison.high


def test_a_network_without_a_library_is_an_error_with_its_node(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codegen.cuda_emission, "build_cuda", lambda *_, **__: NoBinary("TVM cannot import Det culprit"))
    with pytest.raises(UnsupportedError, match=r"^small\.onnx: TVM cannot import Det culprit$"):
        CudaEmitter(GPUS["a100"], "none")(request(small, tmp_path, RecordingEvents()))


def test_targets_are_written_as_gpus_or_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen.cuda_target, "find_gpu", lambda: "no driver of NVIDIA")
    plain, hopper = parse_target("cuda"), parse_target("cuda:arch=sm_90")
    assert (plain.spec["model"], hopper.spec["model"]) == ("A100 SXM4 80GB", "H100 SXM5")
    assert hopper.spec["target"]["arch"] == "sm_90" and hopper.spec["source"] == "data sheet"
    assert "energy" not in plain.metrics and plain.clock_hz is None
    json.dumps(plain.spec, allow_nan=False)
    with pytest.raises(UsageError, match="gpu=x: no such GPU"):
        parse_target("cuda:gpu=x")


def test_the_machine_s_own_gpu_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen.cuda_target, "find_gpu", lambda: FoundGpu("Some GPU", "sm_89"))
    assert parse_target("cuda").spec["target"]["arch"] == "sm_89"
    assert parse_target("cuda:gpu=t4").spec["target"]["arch"] == "sm_75"


@pytest.mark.slow
def test_lower_for_a_gpu_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Large batches, so that arithmetic and not launches is what a roofline sees."""
    if isinstance(codegen.cuda_target.find_gpu(), FoundGpu):
        pytest.skip("this machine has a GPU")
    words = ["lower", str(ROOT / "examples/digits.onnx"), "--target", "cuda:arch=sm_80", "--latency", "80%"]
    words += ["--shape", "image=512,1,16,16", "--samples", "64", "--effort", "quick", "-o", str(tmp_path / "out")]
    words += ["--calib", str(ROOT / "examples/digits_data.py:calibration"), "--json", "-"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capfd.readouterr()
    assert ended.value.code == 0, captured.err
    report = json.loads(captured.out)
    for network in (report["baseline"], report["result"]):
        assert network["latency"]["kind"] == "estimated" and network["latency"]["unit"] == "s"
        assert network["energy"] is None
    assert report["result"]["latency"]["value"] <= 0.8 * report["baseline"]["latency"]["value"]
    assert any("was not run" in text for text in report["warnings"])
    assert report["verification"]["binary"] is None
    assert {report["artifacts"][name] for name in ("binary", "cuda_source", "ptx")} == set(ARTIFACTS.values())
    assert ".target sm_80" in (tmp_path / "out" / "model.ptx").read_text()
    layers = json.loads((tmp_path / "out" / "plan.json").read_text())["layers"]
    canonical = json.dumps(layers, sort_keys=True, separators=(",", ":"))
    assert read_metadata(tmp_path / "out" / "model.so").plan == hashlib.sha256(canonical.encode()).hexdigest()
