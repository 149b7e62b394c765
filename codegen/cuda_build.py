"""Compiles an ONNX file for a GPU in a process of its own: CUDA C++, PTX, and a library that carries the PTX."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codegen.child_process import Failure, call
from codegen.cuda_gpus import Gpu
from codegen.tvm_build import Binary, NoBinary

SOURCE, PTX = "model.cu", "model.ptx"

COMPILERS = ("nvcc", "llvm")
"""What may make PTX of the kernels, the better one first."""

_LIMIT_BYTES = 2**31 - 1
_ENTRY = re.compile(r"^\s*\.visible\s+\.entry\s+(\w+)\s*\(", re.MULTILINE)
_ARCH = re.compile(r"^\s*\.target\s+(sm_\w+)", re.MULTILINE)


@dataclass(frozen=True)
class CudaBuild:
    """What was compiled. ``kernels``: names in source and PTX. ``notes``: what made the PTX and checked it."""

    binary: Binary
    kernels: tuple[str, ...]
    notes: tuple[str, ...]


def build_cuda(
    model: Path,
    folder: Path,
    library: str,
    shapes: Mapping[str, tuple[int, ...]],
    gpu: Gpu,
    *,
    plan: str = "",
    compilers: Sequence[str] = COMPILERS,
    timeout_s: float | None = None,
) -> CudaBuild | NoBinary:
    """Writes ``library``, model.cu and model.ptx to ``folder``, for the input ``shapes`` alone; no GPU is needed.

    The library carries the PTX, which the driver of any GPU of this architecture or a later one compiles when it is
    loaded. The first of ``compilers`` that is installed and knows the architecture makes it: nvcc from model.cu, or
    the LLVM that TVM comes with, from the same schedules. Where ptxas is installed, it accepts the PTX, or there is no
    binary.
    """
    size = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    if size > _LIMIT_BYTES:
        return NoBinary(f"the network has {size / 2**30:.2f} GiB, TVM's importer takes up to 2 GiB")
    source, ptx, target = folder / SOURCE, folder / PTX, folder / library
    request = {
        "model": str(model.absolute()),
        "library": str(target.absolute()),
        "source": str(source.absolute()),
        "ptx": str(ptx.absolute()),
        "shapes": dict(shapes),
        "target": gpu.target,
        "device": gpu.device().model,
        "plan": plan,
        "compilers": list(compilers),
    }
    # the same on a machine with a GPU, where TVM would load CUDA's runtime and compile the kernels by itself
    environment = {"TVM_COMPILE_FORCE_FALLBACK": "1"}
    answer = call("codegen.cuda_build_child", request, environment=environment, timeout_s=timeout_s)
    if isinstance(answer, Failure):
        answer = {"reason": f"TVM's compiler {answer.reason}", "log": answer.log}
    problem = answer.get("reason") or _wrong(source, ptx, gpu.arch, answer["kernels"])
    notes = list(answer.get("notes", ()))
    if not problem:
        problem, said = _assembled(ptx, gpu.arch)
        notes.append(said)
    if problem:
        for path in (source, ptx, target):
            path.unlink(missing_ok=True)
        return NoBinary(problem, answer.get("log", ""))
    binary = Binary(
        target,
        tuple(answer["inputs"]),
        tuple(answer["outputs"]),
        {name: tuple(shape) for name, shape in answer["bound"].items()},
        answer["coarse"],
    )
    return CudaBuild(binary, tuple(answer["kernels"]), tuple(notes))


def entries(ptx: str) -> list[str]:
    """Names of the kernels in a PTX text."""
    return _ENTRY.findall(ptx)


def architecture(ptx: str) -> str:
    """The architecture that a PTX text is for, such as sm_80; empty where it names none."""
    found = _ARCH.search(ptx)
    return found[1] if found else ""


def _wrong(source: Path, ptx: Path, arch: str, kernels: list[str]) -> str:
    text, code = source.read_text(encoding="utf-8"), ptx.read_text(encoding="utf-8")
    if architecture(code) != arch:
        return f"{PTX} is for {architecture(code) or 'no architecture'}, expected {arch}"
    for name in kernels:
        if name not in entries(code) or f" {name}(" not in text:
            return f"the kernel {name} is missing from {PTX} or {SOURCE}"
    return ""


def _assembled(ptx: Path, arch: str) -> tuple[str, str]:
    """What ptxas has against the PTX, empty where nothing, and a note."""
    if shutil.which("ptxas") is None:
        return "", f"{PTX} was not checked: ptxas is not installed"
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        command = ["ptxas", f"-arch={arch}", "-o", f"{folder}/model.cubin", str(ptx)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaint = next((line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()), "")
    if done.returncode == 0:
        return "", f"{PTX}: accepted by ptxas for {arch}"
    if "is not defined for option" in complaint:
        return "", f"{PTX} was not checked: this ptxas does not know {arch}"
    return f"ptxas refuses {PTX}: {complaint[:300]}", ""
