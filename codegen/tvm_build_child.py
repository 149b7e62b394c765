"""The compiling process: ``python -m codegen.tvm_build_child REQUEST ANSWER``; see :mod:`codegen.tvm_build`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen.child_process import reply
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from codegen.tvm_kernels.imports import load_importer
from codegen.tvm_network import Lowered, compile_network
from codegen.tvm_network_onnx import Refused, free_inputs, is_coarse, is_symbolic, prepared


def _build(request: Mapping[str, Any]) -> dict[str, Any]:
    import onnx

    path, library = Path(request["model"]), Path(request["library"])
    device = Device(**request["device"])
    schedules = {key: Schedule.from_json(value) for key, value in request["schedules"].items()}
    model = onnx.load(path)
    network = hashlib.sha256(path.read_bytes()).hexdigest()
    shapes = {value.name: request["shapes"][value.name] for value in free_inputs(model)} if is_symbolic(model) else {}

    def attempt(bound: Mapping[str, list[int]]) -> Lowered:
        def source(workload: Workload) -> Schedule | None:
            return schedules.get(workload.key)

        return compile_network(
            prepared(path, bound), library, device, source, network=network, plan=str(request["plan"])
        )

    first, second = (shapes, {}) if request["bind"] else ({}, shapes)
    bound = first
    try:
        made = attempt(bound)
    except Refused as refusal:
        if not shapes:
            raise
        bound = second
        try:
            made = attempt(bound)
        except Refused as other:
            # Fixed shapes can contradict a network that has branches for several: then the other try tells more.
            raise (other if other.by_tvm else refusal) from other
    return {
        "inputs": [value.name for value in free_inputs(model)],
        "outputs": [value.name for value in model.graph.output],
        "bound": bound,
        "coarse": is_coarse(model),
        "kernels": [
            {
                "name": kernel.name,
                "calls": kernel.calls,
                "arguments": kernel.arguments,
                "workload": kernel.workload,
                "schedule": kernel.schedule,
            }
            for kernel in made.kernels
        ],
        "notes": made.notes,
    }


if __name__ == "__main__":
    reply(_build, Refused, load_importer)
