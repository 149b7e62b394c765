"""The process that builds what devices run: ``python -m codegen.farm.build_child SETUP``, SETUP being JSON.

SETUP names the device and the folder for files. One request is one line, see :mod:`codegen.farm.answering`:

    {"id": 1, "workload": "conv ...", "schedule": {...}}    {"id": 1, "library": path, "arguments": path}

``schedule`` null: the workload's default. With the arguments stands what the kernel must compute, see
:class:`codegen.tune.reference.Reference`, and the shape of its output.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from codegen.farm.answering import Handler, answer_all
from codegen.tune import spaces
from codegen.tune.device import Device
from codegen.tune.reference import Reference
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload


def start() -> Handler:
    from codegen.tvm_kernels import tensors
    from codegen.tvm_kernels.build import build_kernel, kernel_shapes
    from codegen.tvm_kernels.imports import load_tvm

    load_tvm()
    setup = json.loads(sys.argv[1])
    device, folder = Device(**setup["device"]), Path(setup["folder"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        workload = Workload.parse(request["workload"])
        written = request["schedule"]
        schedule = spaces.default(workload, device) if written is None else Schedule.from_json(written)
        executable = build_kernel(workload, schedule, device)
        reference = _reference(workload)
        x, _, bias, y = kernel_shapes(workload, schedule)
        arguments = folder / f"{request['id']}.npz"
        np.savez(
            arguments,
            allow_pickle=False,
            x=reference.x.reshape(x),
            weight=tensors.pack(reference.weight, workload, schedule),
            bias=reference.bias.reshape(bias),
            y=np.array(y),
            positions=reference.positions,
            values=reference.values,
        )
        library = export(executable, folder, str(request["id"]), device)
        return {"library": str(library), "arguments": str(arguments)}

    return answer


@lru_cache(maxsize=4)
def _reference(workload: Workload) -> Reference:
    return Reference.of(workload)


def export(executable: Any, folder: Path, name: str, device: Device) -> Path:
    """A library where there is a linker for the device, else an archive of objects, which the device links itself."""
    from tvm.support import cc

    triple = str(device.target.get("mtriple", ""))
    if not triple:
        path = folder / f"{name}.so"
        executable.export_library(str(path))
        return path
    compiler = next((c for c in (f"{triple}-g++", f"{triple}-gcc") if shutil.which(c)), None)
    path = folder / f"{name}{'.tar' if compiler is None else '.so'}"
    options = {} if compiler is None else {"fcompile": cc.cross_compiler(compiler)}
    executable.export_library(str(path), **options)
    return path


if __name__ == "__main__":
    answer_all(start)
