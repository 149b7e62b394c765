"""Convolutions and products with constant weights become annotated tensor expressions; the rest is TVM's own.

What no template takes (symbolic shapes, weights that are computed, other layouts and types) is left to TVM's
legalization and gets a schedule by rules, so that nothing fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from codegen.tune import spaces
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule, ScheduleSource
from codegen.tune.spaces_plane import Plane
from codegen.tune.workload import Workload
from codegen.tvm_kernels import tensors
from codegen.tvm_kernels.imports import load_tvm
from passes.core.cost import StageWork
from passes.core.site import Geometry

Expr = Any  # tvm.relax.Expr
_FUSABLE = 4  # OpPatternKind.kOutEWiseFusable: elementwise operators are fused behind it


def legalized(mod: Any, device: Device, source: ScheduleSource) -> Any:
    """``mod`` (a Relax module, not changed) with every operator as a call of a TIR function.

    ``source`` is asked for the schedule of each layer; where it has none, the layer's default is taken.
    """
    load_tvm()
    from tvm import relax

    layers = _Layers(device, source)
    own = {
        "relax.nn.conv1d": layers.convolution,
        "relax.nn.conv2d": layers.convolution,
        "relax.matmul": layers.product,
    }
    mod = relax.transform.LegalizeOps(own)(mod)
    return relax.transform.LegalizeOps()(mod)


@dataclass(frozen=True)
class _Layers:
    device: Device
    source: ScheduleSource

    def schedule(self, workload: Workload) -> Schedule:
        return self.source(workload) or spaces.default(workload, self.device)

    def convolution(self, bb: Any, call: Expr) -> Expr:
        x, weight = call.args[0], _constant(bb, call.args[1])
        shape = _static(x)
        attrs, n = call.attrs, len(shape or ()) - 2
        layouts = {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW")}.get(n)
        if shape is None or weight is None or layouts != (attrs.data_layout, attrs.kernel_layout):
            return call
        if attrs.out_layout != attrs.data_layout or x.ty.dtype != call.ty.dtype or str(call.ty.dtype) != "float32":
            return call
        geometry = Geometry(
            tuple(weight.shape[2:]),
            _ints(attrs.strides),
            _ints(attrs.dilation),
            _ints(attrs.padding),
            int(attrs.groups),
        )
        return self.emit_convolution(bb, x, weight, geometry, shape)

    def emit_convolution(self, bb: Any, x: Expr, weight: Any, geometry: Geometry, shape: tuple[int, ...]) -> Expr:
        from tvm import relax

        workload = Workload.of(StageWork(geometry, shape[1], weight.shape[0], shape[2:], shape[0]))
        schedule = self.schedule(workload)
        plane = Plane.of(workload)
        assert plane is not None
        if schedule.template not in tensors.CONVOLUTIONS:
            schedule = spaces.default(workload, self.device)
        packed = relax.const(tensors.pack(weight, workload, schedule))
        attrs = tensors.workload_attrs(workload, schedule)
        return bb.call_te(
            lambda data, w: tensors.CONVOLUTIONS[schedule.template](data, w, plane, schedule, attrs),
            x,
            packed,
            primfunc_name_hint="conv",
            primfunc_attrs={"op_pattern": _FUSABLE},
        )

    def product(self, bb: Any, call: Expr) -> Expr:
        from tvm import relax

        x, weight = call.args[0], _constant(bb, call.args[1])
        shape = _static(x)
        if shape is None or weight is None or weight.ndim != 2 or len(shape) < 2 or 0 in shape:
            return call
        if x.ty.dtype != call.ty.dtype or str(call.ty.dtype) != "float32":
            return call
        rows = int(np.prod(shape[:-1]))
        workload = Workload.of(StageWork(Geometry(), shape[-1], weight.shape[1], (), rows))
        schedule = self.schedule(workload)
        if schedule.template not in ("dense", "metaschedule"):
            schedule = spaces.default(workload, self.device)
        if schedule["tw"] > shape[-2]:
            schedule = Schedule.of(schedule.template, **{**dict(schedule.params), "tw": shape[-2]})
        packed = relax.const(tensors.pack(np.ascontiguousarray(weight.T), workload, schedule))
        attrs = tensors.workload_attrs(workload, schedule)
        return bb.call_te(
            lambda data, w: tensors.dense(data, w, schedule, attrs),
            x,
            packed,
            primfunc_name_hint="dense",
            primfunc_attrs={"op_pattern": _FUSABLE},
        )


def _constant(bb: Any, value: Expr) -> Any:
    """The array of a constant, through what it is bound to; None where ``value`` is computed."""
    from tvm import relax

    while isinstance(value, relax.Var):
        value = bb.lookup_binding(value)
    return value.value.numpy() if hasattr(value, "value") else None


def _static(value: Expr) -> tuple[int, ...] | None:
    shape = getattr(value.ty, "shape", None)
    values = getattr(shape, "values", None)
    if values is None:
        return None
    sizes = [getattr(v, "value", None) for v in values]
    return None if any(size is None for size in sizes) else tuple(int(size) for size in sizes)


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


_ = Callable
