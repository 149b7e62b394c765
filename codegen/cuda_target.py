"""The target ``cuda``: code for an NVIDIA GPU, made without one; prices are a roofline's until there is a GPU to time.

``cuda``, ``cuda:arch=sm_90``, ``cuda:gpu=h100``.
"""

from __future__ import annotations

from collections.abc import Mapping

from codegen.cuda_driver import FoundGpu, find_gpu
from codegen.cuda_emission import CudaEmitter
from codegen.cuda_gpus import GPUS, gpu_for
from codegen.cuda_latency import CudaRoofline
from codegen.report.build import tool_versions
from codegen.target import Target
from codegen.tvm_versions import check_tvm
from passes.core.cost import METRICS


class CudaTarget:
    """Makes targets of the GPU that the options name; without any it is this machine's, or an A100 if it has none."""

    name = "cuda"

    def make(self, written: str, options: Mapping[str, str]) -> Target:
        """UsageError for a GPU or an architecture that is not in :data:`codegen.cuda_gpus.GPUS`."""
        check_tvm()
        here = find_gpu()
        chosen = dict(options)
        if not chosen and isinstance(here, FoundGpu) and here.arch in {gpu.arch for gpu in GPUS.values()}:
            chosen = {"arch": here.arch}
        gpu = gpu_for(chosen)
        emitter = CudaEmitter(gpu, here)
        return Target(
            name=written,
            spec={
                "model": gpu.name,
                "target": gpu.target,
                "peak_flops": gpu.flops,
                "peak_bytes_per_s": gpu.bytes_per_s,
                "source": "data sheet",
                "found": here if isinstance(here, str) else f"{here.name}, {here.arch}",
            },
            latency=CudaRoofline(gpu),
            emit=emitter,
            clock_hz=None,
            versions=tool_versions(),
            baseline=emitter.baseline,
            metrics=tuple(metric for metric in METRICS if metric != "energy"),
            close=emitter.close,
        )
