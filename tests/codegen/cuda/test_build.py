"""Libraries for a GPU made without one: what is in the files, and what they compute on the emulated GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from codegen.cuda_build import CudaBuild, architecture, build_cuda, entries
from codegen.cuda_driver import FoundGpu, find_gpu
from codegen.cuda_gpus import GPUS
from codegen.cuda_run import run_on_gpu
from codegen.onnx_runs import run_file
from codegen.runner.build import build_runner
from codegen.runner.library import runtime_folder
from codegen.runner.metadata import read_metadata
from codegen.tvm_build import NoBinary
from passes.errors import VerificationError
from tests.codegen.cuda.conftest import SHAPES
from tests.codegen.cuda.emulator import build_kernels

ROOT = Path(__file__).resolve().parents[3]


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(SHAPES["x"]).astype(np.float32)} for _ in range(count)]


def test_the_files_hold_a_kernel_for_each_layer(built: CudaBuild) -> None:
    source, ptx = (built.binary.library.with_name(name).read_text() for name in ("model.cu", "model.ptx"))
    assert architecture(ptx) == "sm_80"
    assert sorted(entries(ptx)) == sorted(built.kernels)
    # three convolutions, one of them grouped, and a product; legal names of TVM's own making
    assert sum("conv2d" in name for name in built.kernels) == 3 and sum("matmul" in name for name in built.kernels) == 1
    assert all(f"{name}(" in source for name in built.kernels)


def test_the_library_carries_that_ptx_and_says_what_it_is(built: CudaBuild) -> None:
    library = built.binary.library
    data = library.read_bytes()
    assert library.with_name("model.ptx").read_bytes() in data
    assert b"__global__" not in data  # the source would need a compiler where it runs
    metadata = read_metadata(library)
    assert metadata.target["kind"] == "cuda" and metadata.target["arch"] == "sm_80"
    assert metadata.device == "NVIDIA A100 SXM4 80GB" and metadata.plan == "abc"
    assert [info.text for info in metadata.inputs] == ["x: float32[2, 3, 10, 10]"]
    assert [info.text for info in metadata.outputs] == [
        "probabilities: float32[2, 5]",
        "map: float32[2, 8, 10, 10]",
    ]


def test_on_the_emulated_gpu_it_computes_what_onnxruntime_does(built: CudaBuild, small: Path, emulated: Path) -> None:
    """Host code, launches and kernels: all but the compiler from CUDA C++ to PTX."""
    library = built.binary.library
    count = build_kernels(library.with_name("model.cu"), library.with_name("model.ptx"), emulated)
    assert count == len(built.kernels)
    given = feeds(2)
    outputs, seconds = run_on_gpu({"it": library}, given, blocks=2, calls=3)
    assert seconds["it"].shape == (2, 3) and (seconds["it"] > 0).all()
    for made, want in zip(outputs["it"], run_file(small, given, apart=False), strict=True):
        for have, reference in zip(made, want, strict=True):
            # sums of at most 72 products of values near 1
            np.testing.assert_allclose(have, reference, rtol=1e-5, atol=1e-5)


def test_without_a_driver_a_run_says_what_is_missing(built: CudaBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(find_gpu(), FoundGpu):
        pytest.skip("this machine has a GPU")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(VerificationError, match=r"model\.so on the GPU: libtvm_runtime_cuda\.so cannot be loaded: lib"):
        run_on_gpu({"it": built.binary.library}, feeds(1), blocks=1, calls=1)


@pytest.mark.slow  # two more compilations
@pytest.mark.parametrize("compiler", ["nvcc", "llvm"])
def test_either_compiler_makes_ptx_of_the_same_kernels(
    built: CudaBuild, small: Path, tmp_path: Path, compiler: str
) -> None:
    if compiler == "nvcc" and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    made = build_cuda(small, tmp_path, "model.so", SHAPES, GPUS["h100"], compilers=(compiler,))
    assert isinstance(made, CudaBuild), made
    ptx = (tmp_path / "model.ptx").read_text()
    assert architecture(ptx) == "sm_90" and sorted(entries(ptx)) == sorted(built.kernels)
    assert made.notes[0] == f"PTX for sm_90 by {'nvcc' if compiler == 'nvcc' else 'LLVM'}"
    assert "__nv_" not in ptx
    if shutil.which("ptxas") is not None:
        assert made.notes[1] == "model.ptx: accepted by ptxas for sm_90"
        image = tmp_path / "model.cubin"
        subprocess.run(["ptxas", "-arch=sm_90", str(tmp_path / "model.ptx"), "-o", str(image)], check=True)
        assert image.read_bytes()[:4] == b"\x7fELF"


def test_an_operator_that_tvm_lacks_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Det", ["x"], ["y"], "culprit")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "det.onnx")
    failed = build_cuda(tmp_path / "det.onnx", tmp_path, "det.so", {"x": (3, 3)}, GPUS["a100"])
    assert isinstance(failed, NoBinary)
    assert "Det 'culprit'" in failed.reason and "\n" not in failed.reason
    assert sorted(path.name for path in tmp_path.iterdir()) == ["det.onnx"]


def test_what_ptx_says_is_read_off_it() -> None:
    head = "//\n.version 8.0\n.target sm_90a, debug\n\n"
    text = head + ".visible .entry f_kernel(\n\t.param .u64 p\n)\n.visible .func g(\n)\n"
    assert architecture(text) == "sm_90a" and entries(text) == ["f_kernel"]
    assert architecture("") == "" and entries("") == []


PROBE = "from codegen.cuda_driver import find_gpu; print(find_gpu())"


@pytest.mark.parametrize(
    ("none", "said"),
    [(False, "FoundGpu(name='Emulated GPU', arch='sm_80')"), (True, "a driver of NVIDIA that finds no GPU")],
)
def test_the_driver_is_asked_for_its_gpu(
    emulated: Path, monkeypatch: pytest.MonkeyPatch, none: bool, said: str
) -> None:
    if none:
        monkeypatch.setenv("EMULATED_NONE", "1")
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.stderr) == (said, "")


def test_newer_gpus_run_older_ptx() -> None:
    gpu = FoundGpu("it", "sm_90")
    assert gpu.runs("sm_80") and gpu.runs("sm_90") and not gpu.runs("sm_100")


@pytest.mark.slow  # compiles the runner
def test_the_runner_in_cpp_runs_it_too(built: CudaBuild, small: Path, emulated: Path, tmp_path: Path) -> None:
    library, (given,) = built.binary.library, feeds(1)
    build_kernels(library.with_name("model.cu"), library.with_name("model.ptx"), emulated)
    runner = build_runner(tmp_path / "runner", options=("-O0",))
    np.save(tmp_path / "x.npy", given["x"])
    words = [runner, library, "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path]
    runtime = runtime_folder() / "libtvm_runtime_cuda.so"
    refused = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 4 and "cuda" in refused.stderr
    done = subprocess.run([*words, "--load", runtime], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (want,) = run_file(small, [given], apart=False)
    for name, reference in zip(built.binary.outputs, want, strict=True):
        made = np.load(tmp_path / f"{name}.npy", allow_pickle=False)
        np.testing.assert_allclose(made, reference, rtol=1e-5, atol=1e-5)
