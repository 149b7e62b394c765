"""The compiling process of :mod:`codegen.cuda_build`: ``python -m codegen.cuda_build_child REQUEST ANSWER``.

TVM writes CUDA C++, and puts it into the library where it finds no GPU: such a library needs a compiler on the machine
that runs it. So the kernels become PTX here, and the library carries that in the source's place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from codegen.child_process import reply
from codegen.cuda_kernels import kernel_names, scheduled_for_cuda
from codegen.cuda_ptx import by_llvm, by_nvcc, carry_ptx
from codegen.runner.attach import attach, describe
from codegen.tvm_network import imported
from codegen.tvm_network_onnx import Refused, free_inputs, is_coarse, prepared
from passes.errors import first_line


def _build(request: dict[str, Any]) -> dict[str, Any]:
    from codegen.tvm_kernels.imports import load_tvm

    tvm = load_tvm()
    from tvm.support import cc

    if cc.get_cc() is None:
        raise Refused("no C++ compiler was found to link the library with: install g++ or set CXX")
    path, library = Path(request["model"]), Path(request["library"])
    import onnx

    original = onnx.load(path, load_external_data=False)
    bound = {value.name: request["shapes"][value.name] for value in free_inputs(original)}
    model = prepared(path, bound)
    module = imported(model)
    inputs, outputs = [[value.name for value in values] for values in (model.graph.input, model.graph.output)]
    metadata = describe(
        module,
        inputs,
        outputs,
        request["target"],
        device=request["device"],
        network=hashlib.sha256(path.read_bytes()).hexdigest(),
        plan=request["plan"],
    )
    cuda = tvm.target.Target(request["target"], host={"kind": "llvm"})
    notes: list[str] = []
    try:
        module = scheduled_for_cuda(module, cuda)
        with cuda:
            executable = tvm.compile(attach(module, metadata), target=cuda)
        host, kernels = _device_code(executable.mod)
        source = str(kernels.inspect_source())
        Path(request["source"]).write_text(source, encoding="utf-8")
        ptx = ""
        for compiler in request["compilers"]:
            made = by_nvcc if compiler == "nvcc" else by_llvm
            ptx, said = made(module, Path(request["source"]), request["target"])
            notes.append(said)
            if ptx:
                break
        if not ptx:
            raise Refused("; ".join(notes))
        Path(request["ptx"]).write_text(ptx, encoding="utf-8")
        carry_ptx(host, kernels, ptx)
        executable.export_library(str(library))
    except Refused:
        raise
    except Exception as error:
        library.unlink(missing_ok=True)
        raise Refused(f"TVM cannot compile the network: {first_line(error)}", by_tvm=True) from error
    return {
        "inputs": inputs,
        "outputs": outputs,
        "bound": bound,
        "coarse": is_coarse(original),
        "kernels": kernel_names(source),
        "notes": notes,
    }


def _device_code(module: Any) -> tuple[Any, Any]:
    """The module of kernels among those that ``module`` imports, and the one that imports it. Refused without any."""
    waiting = [module]
    while waiting:
        one = waiting.pop()
        for other in one.imports:
            if other.kind == "cuda":
                return one, other
            waiting.append(other)
    raise Refused("the network has no operator that runs on a GPU")


if __name__ == "__main__":
    reply(_build, Refused)
