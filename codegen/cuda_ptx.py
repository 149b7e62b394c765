"""PTX of scheduled kernels, by nvcc or by TVM's LLVM, and how a library carries it. TVM is imported inside functions.

TVM's NVPTX back end is older than the LLVM that it comes with. What it needs to be told: barriers have an operand now,
kernels are no longer recognized by metadata, and vectors of calls, such as fma, have no form in it.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen.tvm_network_onnx import Refused
from passes.errors import first_line

_FUNCTION = re.compile(r"^(\s*\.visible\s+)\.func(\s+\w+\()", re.MULTILINE)
_LIBDEVICE = re.compile(r"\b(__nv_\w+?)(?:_param_\d+)?\b")


def by_nvcc(module: Any, source: Path, target: Mapping[str, Any]) -> tuple[str, str]:
    """PTX of the CUDA C++ in ``source`` and a note; no PTX where nvcc is not installed or does not know the arch.

    Refused where nvcc does not take the source.
    """
    del module
    arch = target["arch"]
    if shutil.which("nvcc") is None:
        return "", "nvcc is not installed"
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        made = Path(folder) / "model.ptx"
        command = ["nvcc", "-w", "-O3", "-ptx", f"-arch={arch}", "-o", str(made), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return made.read_text(encoding="utf-8"), f"PTX for {arch} by nvcc"
    complaint = first_line(RuntimeError(done.stderr or done.stdout))
    if "Unsupported gpu architecture" in complaint:
        return "", f"this nvcc does not know {arch}"
    raise Refused(f"nvcc refuses the kernels: {complaint}")


def by_llvm(module: Any, source: Path, target: Mapping[str, Any]) -> tuple[str, str]:
    """PTX of the scheduled ``module`` by the LLVM that TVM comes with, and a note. Refused where it takes libdevice."""
    del source
    import tvm

    use_nvptx(tvm)
    nvptx = nvptx_target(tvm, target)
    with nvptx, tvm.transform.PassContext(config={"tirx.disable_vectorize": True}):
        waiting = [tvm.compile(module, target=nvptx).mod]
    text = ""
    while waiting:
        one = waiting.pop()
        text = str(one.inspect_source("ptx")) if one.kind == "cuda" else text
        waiting.extend(one.imports)
    # the module holds kernels and nothing else that is visible
    text = _FUNCTION.sub(r"\1.entry\2", text)
    missing = sorted(set(_LIBDEVICE.findall(text)))
    if missing:
        raise Refused(f"{', '.join(missing)} of NVIDIA's libdevice, which comes with nvcc: install it")
    return text, f"PTX for {target['arch']} by LLVM"


def carry_ptx(host: Any, kernels: Any, ptx: str) -> None:
    """Puts PTX in the place of the CUDA C++ that ``host`` imports as ``kernels``; g++ compiles a module for it."""
    import tvm_ffi
    from tvm.support import cc
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    source = Path(__file__).with_name("cuda_ptx_module.cc")
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        library = Path(folder) / "ptx_module.so"
        options = ["-std=c++17", "-O1", f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
        cc.create_shared(str(library), [str(source)], options)
        made = tvm_ffi.load_module(str(library))
    host.clear_imports()
    host.import_module(made["with_ptx"](kernels, ptx))
    _CODE.append(made)


_CODE: list[Any] = []
"""Libraries whose code objects still in use run: unloading them would pull it from under them."""


def nvptx_target(tvm: Any, target: Mapping[str, Any]) -> Any:
    """The target of LLVM's NVPTX back end that stands for the CUDA target ``target``."""
    return tvm.target.Target(
        {
            "kind": "nvptx",
            "mtriple": "nvptx64-nvidia-cuda",
            "mcpu": target["arch"],
            "max_num_threads": target["max_threads_per_block"],
            "thread_warp_size": target["thread_warp_size"],
        },
        host={"kind": "llvm"},
    )


def use_nvptx(tvm: Any) -> None:
    """Registers what makes TVM's NVPTX back end work with the LLVM that it comes with, in this process.

    It writes barriers without the operand that they have now, and functions of mathematics as calls into NVIDIA's
    libdevice; those that a network commonly has are written as the GPU's own instructions where that is not installed.
    """
    from tvm import tirx
    from tvm.tirx.op import register_intrin_lowering

    libdevice = _libdevice()
    tvm.register_global_func("tvm_callback_libdevice_path", lambda *_: libdevice, override=True)

    def intrinsic(name: str, kind: str, *arguments: Any) -> Any:
        return tirx.call_llvm_intrin(kind, name, *arguments)

    def synchronize(call: Any) -> Any:
        if str(call.args[0].value) == "warp":
            return intrinsic("llvm.nvvm.bar.warp.sync", "void", tirx.const(-1, "int32"))
        return intrinsic("llvm.nvvm.barrier.cta.sync.aligned.all", "void", tirx.const(0, "int32"))

    rules = {"tirx.tvm_storage_sync": synchronize}
    if not libdevice:
        rules |= _by_instructions(tirx)
    rules["tirx.fma"] = lambda call: intrinsic("llvm.fma", _type(call), *call.args)
    for name, rule in rules.items():
        register_intrin_lowering(name, target="nvptx", f=rule, level=99)


def _by_instructions(tirx: Any) -> dict[str, Any]:
    """float32 functions by ``ex2.approx`` and ``lg2.approx``, whose relative errors PTX bounds by about 2**-22."""

    def exp2(value: Any) -> Any:
        return tirx.call_llvm_intrin("float32", "llvm.exp2", value)

    def exp(value: Any) -> Any:
        return exp2(value * tirx.const(1 / math.log(2), "float32"))

    def log(value: Any) -> Any:
        return tirx.call_llvm_intrin("float32", "llvm.nvvm.lg2.approx.f", value) * tirx.const(math.log(2), "float32")

    def tanh(value: Any) -> Any:
        one = tirx.const(1, "float32")
        return one - tirx.const(2, "float32") / (exp(value * tirx.const(2, "float32")) + one)

    def of_float32(rule: Any) -> Any:
        # another type keeps its call into libdevice, which is then named as missing
        return lambda call: rule(call.args[0]) if _type(call) == "float32" else call

    def plain(name: str) -> Any:
        return lambda call: tirx.call_llvm_intrin(_type(call), f"llvm.{name}", call.args[0])

    return {
        "tirx.exp": of_float32(exp),
        "tirx.exp2": of_float32(exp2),
        "tirx.log": of_float32(log),
        "tirx.tanh": of_float32(tanh),
        "tirx.round": plain("nearbyint"),  # TVM's own rule rounds half to even as well
        **{f"tirx.{name}": plain(name) for name in ("sqrt", "nearbyint", "floor", "ceil", "trunc", "fabs")},
    }


def _libdevice() -> str:
    """The path of NVIDIA's bitcode of functions of mathematics; empty where CUDA is not installed."""
    from tvm.support import nvcc

    try:
        place = Path(nvcc.find_cuda_path())
    except RuntimeError:
        return ""
    for folder in (place / "nvvm" / "libdevice", place / "lib" / "nvidia-cuda-toolkit" / "libdevice"):
        for path in sorted(folder.glob("libdevice*.bc")):
            return str(path)
    return ""


def _type(call: Any) -> str:
    return str(call.ty.dtype)
