"""Schedules for GPUs. TVM is imported when a function is called."""

from __future__ import annotations

import re
from typing import Any

from codegen.tvm_network_onnx import Refused

_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')

_STEPS = ("LegalizeOps", "AnnotateTIROpPattern", "FoldConstant", "FuseOps", "FuseTIR", "DeadCodeElimination")
"""Of Relax, from operators to fused functions."""


def scheduled_for_cuda(module: Any, target: Any) -> Any:
    """A Relax module of operators as functions whose loops are all bound to blocks and threads, by TVM's own rules.

    The rules are dlight's: products and convolutions as tiles in shared memory, reductions by a block, everything else
    a thread for an element. Refused, with its name, where a function has none.
    """
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    with target:
        module = relax.transform.DecomposeOpsForInference()(module)
        for step in (
            "LegalizeOps",
            "AnnotateTIROpPattern",
            "FoldConstant",
            "FuseOps",
            "FuseTIR",
            "DeadCodeElimination",
        ):
            module = getattr(relax.transform, step)()(module)
        gpu = dlight.gpu
        rules = gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()
        module = dlight.ApplyDefaultSchedule(*rules)(module)
    for variable, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc) and not _is_bound(tvm, function):
            raise Refused(f"TVM has no schedule for a GPU for {variable.name_hint}")
    return module


def kernel_names(source: str) -> list[str]:
    """Names of the kernels in CUDA C++ that TVM wrote."""
    return list(dict.fromkeys(_KERNEL.findall(source)))


def _is_bound(tvm: Any, function: Any) -> bool:
    text = str(function.script())
    return (
        "thread_binding" in text or "blockIdx" in text or bool(function.attrs and "tirx.is_host_func" in function.attrs)
    )
