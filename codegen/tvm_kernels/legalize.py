"""Convolutions and products with constant weights become annotated tensor expressions; the rest is TVM's own.

What no template takes (symbolic shapes, weights that are computed, other layouts and types) is left to TVM's
legalization and gets a schedule by rules, so that nothing fails here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
_LAYOUTS = {
    (1, False): ("NCW", "OIW"),
    (2, False): ("NCHW", "OIHW"),
    (1, True): ("NCW", "IOW"),
    (2, True): ("NCHW", "IOHW"),
}


def legalized(mod: Any, device: Device, source: ScheduleSource) -> Any:
    """``mod`` (a Relax module, not changed) with every operator as a call of a TIR function.

    ``source`` is asked for the schedule of each layer; where it has none, or one of a template that does not take the
    layer, the layer's default is taken.
    """
    load_tvm()
    from tvm import relax

    layers = _Layers(device, source)
    own = {
        "relax.nn.conv1d": layers.convolution,
        "relax.nn.conv2d": layers.convolution,
        "relax.nn.conv1d_transpose": layers.transposed,
        "relax.nn.conv2d_transpose": layers.transposed,
        "relax.matmul": layers.product,
    }
    mod = relax.transform.LegalizeOps(own)(mod)
    # What the layers left as it was, or wrote as operators.
    return relax.transform.LegalizeOps()(mod)


@dataclass(frozen=True)
class _Layers:
    """A layer's call and weight become a call of its tensor expression, or stay as they are."""

    device: Device
    source: ScheduleSource

    def convolution(self, bb: Any, call: Expr) -> Expr:
        weight, attrs = _constant(bb, call.args[1]), call.attrs
        if weight is None or not self._takes(call, len(weight.shape) - 2, transposed=False):
            return call
        geometry = Geometry(
            tuple(weight.shape[2:]),
            _ints(attrs.strides),
            _ints(attrs.dilation),
            _ints(attrs.padding),
            int(attrs.groups),
        )
        return self._emit(bb, call, weight, geometry)

    def transposed(self, bb: Any, call: Expr) -> Expr:
        weight, attrs = _constant(bb, call.args[1]), call.attrs
        if weight is None or not self._takes(call, len(weight.shape) - 2, transposed=True):
            return call
        groups, kernel = int(attrs.groups), weight.shape[2:]
        grouped = weight.reshape(groups, -1, weight.shape[1], *kernel)
        outwards = np.swapaxes(grouped, 1, 2).reshape(groups * weight.shape[1], -1, *kernel)
        geometry = Geometry(
            tuple(kernel),
            _ints(attrs.strides),
            _ints(attrs.dilation),
            _ints(attrs.padding),
            groups,
            True,
            _ints(attrs.output_padding),
        )
        return self._emit(bb, call, outwards, geometry)

    def product(self, bb: Any, call: Expr) -> Expr:
        left, right = (_constant(bb, arg) for arg in call.args)
        if right is not None and right.ndim == 2 and self._floats(call, call.args[0], 2):
            return self._emit_dense(bb, call.args[0], right)
        if left is not None and left.ndim == 2 and self._floats(call, call.args[1], 2):
            return self._emit_left(bb, call, left)
        return call

    def _takes(self, call: Expr, n: int, *, transposed: bool) -> bool:
        attrs = call.attrs
        layouts = attrs.data_layout, attrs.kernel_layout
        plain = _LAYOUTS.get((n, transposed)) == layouts and attrs.out_layout == attrs.data_layout
        return plain and self._floats(call, call.args[0], n + 2)

    def _floats(self, call: Expr, x: Expr, rank: int) -> bool:
        """True if ``x`` and the result are float32 of known sizes, and ``x`` has at least ``rank`` axes."""
        shape = _static(x)
        if shape is None or len(shape) < rank or 0 in shape or self.device.target["kind"] != "llvm":
            return False
        return str(x.ty.dtype) == str(call.ty.dtype) == "float32"

    def _schedule(self, workload: Workload) -> Schedule:
        schedule = self.source(workload)
        names = (*spaces.templates(workload, self.device), "metaschedule")
        if schedule is None or schedule.template not in names:
            return spaces.default(workload, self.device)
        return schedule

    def _emit(self, bb: Any, call: Expr, weight: NDArray[Any], geometry: Geometry) -> Expr:
        shape = _static(call.args[0])
        assert shape is not None
        workload = Workload.of(StageWork(geometry, shape[1], weight.shape[0], shape[2:], shape[0]))
        plane = Plane.of(workload)
        if plane is None or min(work_size for work_size in plane.out) < 1:
            return call
        return self._convolution(bb, call.args[0], weight, workload)

    def _convolution(self, bb: Any, x: Expr, weight: NDArray[Any], workload: Workload) -> Expr:
        from tvm import relax

        schedule, plane = self._schedule(workload), Plane.of(workload)
        assert plane is not None
        attrs = tensors.workload_attrs(workload, schedule)
        return bb.call_te(
            lambda data, w: tensors.CONVOLUTIONS[schedule.template](data, w, plane, schedule, attrs),
            x,
            relax.const(tensors.pack(weight, workload, schedule)),
            primfunc_name_hint="conv",
            primfunc_attrs={"op_pattern": _FUSABLE},
        )

    def _emit_dense(self, bb: Any, x: Expr, weight: NDArray[Any]) -> Expr:
        from tvm import relax

        shape = _static(x)
        assert shape is not None
        workload = Workload.of(StageWork(Geometry(), shape[-1], weight.shape[1], (), prod(shape[:-1])))
        schedule = self._schedule(workload)
        if schedule["tw"] > shape[-2]:  # the rows of a workload are those of all matrices
            schedule = Schedule.of(schedule.template, **{**dict(schedule.params), "tw": shape[-2]})
        attrs = tensors.workload_attrs(workload, schedule)
        return bb.call_te(
            lambda data, w: tensors.dense(data, w, schedule, attrs),
            x,
            relax.const(tensors.pack(np.ascontiguousarray(weight.T), workload, schedule)),
            primfunc_name_hint="dense",
            primfunc_attrs={"op_pattern": _FUSABLE},
        )

    def _emit_left(self, bb: Any, call: Expr, weight: NDArray[Any]) -> Expr:
        """``weight @ x`` is a pointwise convolution over the columns of ``x``."""
        from tvm import relax

        shape = _static(call.args[1])
        assert shape is not None
        batch = prod(shape[:-2])
        workload = Workload.of(StageWork(Geometry.pointwise(1), shape[-2], weight.shape[0], shape[-1:], batch))
        x = bb.emit(relax.op.reshape(call.args[1], (batch, *shape[-2:])))
        y = bb.emit(self._convolution(bb, x, weight[:, :, None], workload))
        return relax.op.reshape(y, (*shape[:-2], weight.shape[0], shape[-1]))


def _constant(bb: Any, value: Expr) -> NDArray[Any] | None:
    """The array of a constant, through what it is bound to; None where ``value`` is computed."""
    from tvm import relax

    while isinstance(value, relax.Var):
        value = bb.lookup_binding(value)
    array: NDArray[Any] | None = value.value.numpy() if hasattr(value, "value") else None
    return array


def _static(value: Expr) -> tuple[int, ...] | None:
    """The sizes of a tensor; None where one is symbolic."""
    values = getattr(getattr(value.ty, "shape", None), "values", None)
    if values is None:
        return None
    sizes = [getattr(v, "value", None) for v in values]
    known = tuple(int(size) for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
