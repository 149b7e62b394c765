"""One kernel alone: a layer with its bias and clamp, compiled as a whole network's are."""

from __future__ import annotations

from typing import Any

import numpy as np

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from codegen.tvm_kernels import tensors
from codegen.tvm_kernels.anchor import Anchored, DoesNotFit
from codegen.tvm_kernels.apply import copied, scheduled_with_notes
from codegen.tvm_kernels.imports import load_tvm
from codegen.tvm_kernels.legalize import legalized
from passes.graph import Note


def build_kernel(workload: Workload, schedule: Schedule, device: Device) -> Any:
    """A TVM executable whose only function ``kernel`` takes x, packed weights, bias and y; see :func:`random_args`.

    Raises DoesNotFit where ``schedule`` does not apply, and TVM's own errors where it cannot be compiled.
    """
    tvm = load_tvm()
    function, notes = kernel_function(workload, schedule, device)
    if notes:
        raise ValueError(f"{schedule} does not apply to {workload.key}: {notes[0].reason}")
    return tvm.compile(tvm.IRModule({"kernel": function}), target=tvm.target.Target(device.target))


def kernel_function(workload: Workload, schedule: Schedule, device: Device) -> tuple[Any, tuple[Note, ...]]:
    """The kernel's TIR function, by the way a network's functions go, and what did not apply."""
    tvm = load_tvm()
    mod = legalized(_layer(workload), device, lambda _: schedule)
    mod = fused(mod)
    mod, notes = scheduled_with_notes(mod, device)
    (function,) = (f for f in mod.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    return function.with_attr("global_symbol", "kernel"), notes


def anchored_kernel(workload: Workload, schedule: Schedule, device: Device) -> Anchored:
    """The kernel's function before its schedule is applied: the anchor, and what is around it inlined."""
    tvm = load_tvm()
    mod = fused(legalized(_layer(workload), device, lambda _: schedule))
    (function,) = (f for f in mod.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    anchored = Anchored.of(tvm.s_tir.Schedule(tvm.IRModule({"main": copied(function)})))
    if anchored is None:
        raise DoesNotFit(f"no template takes {workload.key}")
    return anchored


def fused(mod: Any) -> Any:
    """A legalized module with operators fused into one function each for an anchor and what follows it."""
    from tvm import relax

    for step in ("AnnotateTIROpPattern", "FuseOps", "FuseTIR", "DeadCodeElimination"):
        mod = getattr(relax.transform, step)()(mod)
    return mod


def kernel_shapes(workload: Workload, schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Shapes of the kernel's arguments: x, packed weights, bias, y."""
    work = workload.work
    if not work.geometry.ndim:
        matrix = np.zeros((work.out_channels, work.in_channels), np.float32)
        packed = tensors.pack(matrix, workload, schedule).shape
        return (work.batch, work.in_channels), packed, (work.out_channels,), (work.batch, work.out_channels)
    weight = np.zeros((work.out_channels, work.in_channels // work.geometry.groups, *work.geometry.kernel), np.float32)
    packed = tensors.pack(weight, workload, schedule).shape
    x = work.batch, work.in_channels, *work.spatial
    bias = 1, work.out_channels, *(1,) * work.geometry.ndim
    return x, packed, bias, (work.batch, work.out_channels, *work.output_spatial)


def random_args(workload: Workload, schedule: Schedule, device: Device, *, seed: int = 0, on: Any = None) -> list[Any]:
    """Arguments for a kernel, float32 tensors on TVM's device ``on``, the host's by default."""
    tvm = load_tvm()
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal(shape, np.float32) for shape in kernel_shapes(workload, schedule)]
    return [tvm.runtime.tensor(value, on or tvm.cpu()) for value in values]


def _layer(workload: Workload) -> Any:
    """A Relax module that holds the layer, its bias and a ReLU, with weights of zeros."""
    from tvm import relax

    work, geometry = workload.work, workload.work.geometry
    bb = relax.BlockBuilder()
    if geometry.ndim:
        x = relax.Var("x", relax.TensorType([work.batch, work.in_channels, *work.spatial], workload.dtype))
        bias = np.zeros((1, work.out_channels, *(1,) * geometry.ndim), workload.dtype)
        call = _convolution(x, workload)
    else:
        x = relax.Var("x", relax.TensorType([work.batch, work.in_channels], workload.dtype))
        call = relax.op.matmul(x, relax.const(np.zeros((work.in_channels, work.out_channels), workload.dtype)))
        bias = np.zeros((work.out_channels,), workload.dtype)
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit(relax.op.add(bb.emit(call), relax.const(bias)))
            out = bb.emit_output(relax.op.nn.relu(y))
        bb.emit_func_output(out)
    return bb.get()


def _convolution(x: Any, workload: Workload) -> Any:
    from tvm import relax

    work, geometry, nn = workload.work, workload.work.geometry, relax.op.nn
    options = {
        "strides": geometry.strides,
        "padding": geometry.pads,
        "dilation": geometry.dilations,
        "groups": geometry.groups,
    }
    shape = [work.out_channels, work.in_channels // geometry.groups]
    operators = {1: nn.conv1d, 2: nn.conv2d, 3: nn.conv3d}
    if geometry.transposed:
        shape = [work.in_channels, work.out_channels // geometry.groups]
        options["output_padding"] = geometry.output_padding
        operators = {1: nn.conv1d_transpose, 2: nn.conv2d_transpose, 3: nn.conv3d_transpose}
    weight = relax.const(np.zeros((*shape, *geometry.kernel), workload.dtype))
    return operators[geometry.ndim](x, weight, **options)
