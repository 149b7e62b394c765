"""Schedules for every function of a module: an anchor's template, or rules; what does not apply gets a simpler one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codegen.tune.device import Device
from codegen.tvm_kernels import direct, rules
from codegen.tvm_kernels.anchor import Anchored
from codegen.tvm_kernels.imports import load_tvm
from codegen.tvm_metaschedule import schedule_by_trace
from passes.errors import first_line
from passes.graph import Note

TEMPLATES: dict[str, Callable[[Anchored, Device], None]] = {
    "rows": direct.schedule_rows,
    "channels": direct.schedule_channels,
    "depthwise": direct.schedule_depthwise,
    "dense": direct.schedule_dense,
    "metaschedule": schedule_by_trace,
}


def scheduled(mod: Any, device: Device) -> Any:
    """``mod`` after FuseTIR (not changed) with a schedule for every TIR function; see :func:`scheduled_with_notes`."""
    return scheduled_with_notes(mod, device)[0]


def scheduled_with_notes(mod: Any, device: Device) -> tuple[Any, tuple[Note, ...]]:
    """As :func:`scheduled`, with a note for each function whose own schedule did not apply, by the function's name."""
    tvm = load_tvm()
    if device.target["kind"] != "llvm":
        from tvm.s_tir import dlight

        gpu = dlight.gpu
        rule_set = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())
        with tvm.target.Target(device.target):
            return dlight.ApplyDefaultSchedule(*rule_set)(copied(mod)), ()
    notes: list[Note] = []
    result = tvm.IRModule(mod.functions, attrs=mod.attrs)
    for var, function in mod.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            result.update_func(var, _function(tvm, var.name_hint, function, device, notes))
    return result, tuple(notes)


def _function(tvm: Any, name: str, function: Any, device: Device, notes: list[Note]) -> Any:
    for attempt in (_template, _template_apart, rules.schedule):
        # Scheduling primitives write into the function that they are handed.
        sketch = tvm.s_tir.Schedule(tvm.IRModule({"main": copied(function)}))
        try:
            if attempt(sketch, device):
                return sketch.mod["main"]
        except Exception as error:  # TVM's refusals have no common base
            notes.append(Note(name, attempt.__name__.strip("_"), f"{type(error).__name__}: {first_line(error)}"))
    return function


def _template(sketch: Any, device: Device) -> bool:
    return _by_template(sketch, device, Anchored.of(sketch))


def _template_apart(sketch: Any, device: Device) -> bool:
    """The template for the anchor alone: what follows it has loops of its own."""
    return _by_template(sketch, device, Anchored.of(sketch, alone=True))


def _by_template(sketch: Any, device: Device, anchored: Anchored | None) -> bool:
    if anchored is None:
        return False
    TEMPLATES[anchored.schedule.template](anchored, device)
    for blocks in (anchored.before, anchored.rest):
        rules.schedule_blocks(sketch, blocks, device)
    return True


def copied(value: Any) -> Any:
    """A deep copy of a module or function: what writes into the one leaves the other alone."""
    load_tvm()
    from tvm_ffi.serialization import from_json_graph_str, to_json_graph_str

    # tvm.ir.load_json would first rewrite the text, as what an older version has written may need: most of its time
    return from_json_graph_str(to_json_graph_str(value))
