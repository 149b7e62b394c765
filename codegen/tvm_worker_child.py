"""The process that builds kernels with TVM and times them: ``python -m codegen.tvm_worker_child``.

See :mod:`codegen.tune.worker`, which starts it, and :mod:`codegen.tune.serving` for what they say to each other.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np

from codegen.tune.device import Device
from codegen.tune.reference import Reference
from codegen.tune.schedule import Schedule
from codegen.tune.serving import Builder, Kernel, serve
from codegen.tune.workload import Workload


class TvmKernel:
    """A kernel on TVM's device ``on``, with arguments packed as its schedule reads them."""

    def __init__(self, workload: Workload, schedule: Schedule, device: Device, on: Any) -> None:
        import tvm

        from codegen.tvm_kernels.build import build_kernel, kernel_shapes
        from codegen.tvm_kernels.tensors import pack

        executable = build_kernel(workload, schedule, device)
        self._reference = _reference(workload)
        x, weight, bias, y = kernel_shapes(workload, schedule)
        packed = pack(self._reference.weight, workload, schedule)
        if packed.shape != weight:
            raise ValueError(f"the kernel takes weights of {weight}, packed they are {packed.shape}")
        arrays = (
            self._reference.x.reshape(x),
            packed,
            self._reference.bias.reshape(bias),
            np.full(y, np.nan, np.float32),
        )
        self._args = [tvm.runtime.tensor(np.ascontiguousarray(array), on) for array in arrays]
        self._module = executable.jit() if hasattr(executable, "jit") else executable
        self._on = on

    def output_error(self) -> float:
        self._module["kernel"](*self._args)
        return self._reference.error(self._args[-1].numpy())

    def time(self, calls: int) -> list[float]:
        # One call per sample: the average of a batch carries every disturbance of the batch.
        evaluator = self._module.time_evaluator("kernel", self._on, number=1, repeat=calls)
        return [float(seconds) for seconds in evaluator(*self._args).results]


@lru_cache(maxsize=4)
def _reference(workload: Workload) -> Reference:
    return Reference.of(workload)


def start(device: Device) -> Builder:
    """Loads TVM. Raises where the device is not there."""
    # The reference is computed by a BLAS, which must not start threads of its own beside the kernel's.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from codegen.tvm_kernels.imports import load_tvm
    from codegen.tvm_versions import check_tvm

    check_tvm()
    tvm = load_tvm()
    on = tvm.device("cpu" if device.target["kind"] == "llvm" else device.target["kind"])
    if not on.exist:
        raise ValueError(f"there is no device of kind {device.target['kind']} here")

    def build(workload: Workload, schedule: Schedule) -> Kernel:
        return TvmKernel(workload, schedule, device, on)

    return build


if __name__ == "__main__":
    serve(start)
