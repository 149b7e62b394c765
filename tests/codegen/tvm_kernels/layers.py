"""A kernel's result beside torch's in float64, and Relax functions around layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.cpu_device import host_device
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from codegen.tvm_kernels.build import build_kernel, kernel_shapes
from codegen.tvm_kernels.imports import load_tvm
from codegen.tvm_kernels.tensors import pack

SSE = Device({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}, "any x86-64", 1, 128, 16)
AVX2 = Device({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}, "haswell", 1, 256, 16)
ZNVER4 = Device({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}, "znver4", 1, 512, 32)
NEON = Device({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, "cortex-a72", 1, 128, 32)


@lru_cache(maxsize=2)
def host(threads: int = 1) -> Device:
    return host_device(threads)


def relative_error(workload: Workload, schedule: Schedule, device: Device) -> float:
    """The kernel's largest difference from torch, relative to the largest value."""
    tvm = load_tvm()
    rng = np.random.default_rng(0)
    work = workload.work
    groups = work.geometry.groups
    weight = rng.standard_normal((work.out_channels, work.in_channels // groups, *work.geometry.kernel), np.float32)
    x_shape, packed_shape, bias_shape, y_shape = kernel_shapes(workload, schedule)
    x, bias = rng.standard_normal(x_shape, np.float32), rng.standard_normal(bias_shape, np.float32)
    packed = pack(weight, workload, schedule)
    assert packed.shape == packed_shape
    y = tvm.runtime.tensor(np.full(y_shape, np.nan, np.float32))
    kernel = build_kernel(workload, schedule, device).jit()["kernel"]
    kernel(*(tvm.runtime.tensor(value) for value in (x, packed, bias)), y)
    expected = np.maximum(layer(workload, x, weight, bias.reshape(-1)), 0.0)
    assert expected.shape == y_shape
    return float(np.abs(y.numpy() - expected).max() / max(float(np.abs(expected).max()), 1e-3))


def layer(workload: Workload, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
    """torch's layer in float64; begins and ends of the pads may differ."""
    import torch
    import torch.nn.functional as functional

    g, n = workload.work.geometry, workload.work.geometry.ndim
    values, taps, shift = (torch.from_numpy(v).double() for v in (x, weight, bias))
    if n == 0:
        return (values @ taps.T + shift).numpy()
    convolutions: dict[tuple[int, bool], Callable[..., Any]] = {
        (1, False): functional.conv1d,
        (2, False): functional.conv2d,
        (1, True): functional.conv_transpose1d,
        (2, True): functional.conv_transpose2d,
    }
    convolution = convolutions[n, g.transposed]
    if not g.transposed:
        ends = [side for axis in reversed(range(n)) for side in (g.pads[axis], g.pads[axis + n])]
        return convolution(functional.pad(values, ends), taps, shift, g.strides, 0, g.dilations, g.groups).numpy()
    # torch wants input channels first; what its own pads would cut off is cut off here, what is missing is bias
    inwards = taps.reshape(g.groups, -1, *taps.shape[1:]).swapaxes(1, 2).reshape(x.shape[1], -1, *g.kernel)
    whole = convolution(values, inwards, None, g.strides, 0, 0, g.groups, g.dilations)
    whole = functional.pad(whole, [side for _ in range(n) for side in (0, max(g.strides))])
    cut = (slice(begin, begin + size) for begin, size in zip(g.pads[:n], workload.work.output_spatial, strict=True))
    return (whole[(slice(None), slice(None), *cut)] + shift.reshape(-1, *[1] * n)).numpy()
