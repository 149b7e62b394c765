from __future__ import annotations

import pytest

from codegen.tune import spaces
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.spaces_plane import Plane, phase_window
from codegen.tune.workload import Workload
from passes.core.site import Geometry

DEVICES = [
    Device({"kind": "llvm", "mcpu": "x86-64"}, "sse", 1, 128, 16),
    Device({"kind": "llvm", "mcpu": "haswell"}, "avx2", 1, 256, 16),
    Device({"kind": "llvm", "mcpu": "znver4"}, "avx512", 1, 512, 32),
    Device({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}, "neon", 2, 128, 32),
]
KEYS = {
    "conv 1x16x32x32 -> 13, kernel 3x3, pads 1,1,1,1, float32": ("rows", "channels"),
    "conv 1x64x56x56 -> 64, kernel 3x3, strides 2,2, pads 1,1,1,1, float32": ("rows", "channels"),
    "conv 2x16x7x5 -> 20, kernel 1x1, float32": ("rows", "channels"),
    "conv 1x16x1x1 -> 1, kernel 1x1, float32": ("rows", "channels"),
    "conv 1x12x75 -> 16, kernel 3, pads 1,1, groups 2, float32": ("rows", "channels"),
    "conv 1x32x15x15 -> 32, kernel 3x3, strides 2,2, pads 1,1,1,1, groups 32, float32": ("depthwise",),
    "conv 1x32x15x15 -> 64, kernel 3x3, pads 1,1,1,1, groups 32, float32": ("rows", "channels"),
    "conv_transpose 1x8x8x8 -> 6, kernel 3x3, strides 2,2, pads 1,1,1,1, float32": ("rows", "channels"),
    "linear 1x1024 -> 1000, float32": ("dense",),
    "linear 13x1 -> 1, float32": ("dense",),
    "conv 1x4x5x6x7 -> 8, kernel 3x3x3, float32": (),
    "conv 1x4x5x6 -> 8, kernel 3x3, float16": (),
    "conv_transpose 1x8x8x8 -> 6, kernel 3x3, dilations 2,2, float32": (),
}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.model)
@pytest.mark.parametrize("key", KEYS)
def test_a_space_is_finite_and_fits_the_device(key: str, device: Device) -> None:
    workload = Workload.parse(key)
    names, space = spaces.templates(workload, device), spaces.space(workload, device)
    assert names == KEYS[key]
    assert space[0] == spaces.default(workload, device)
    assert 1 <= len(space) <= 400
    assert len(set(space)) == len(space)
    assert {schedule.template for schedule in space} <= (set(names) or {"plain"})
    for schedule in space if names else ():
        p = dict(schedule.params)
        positions = p.get("th", 1) * p["tw"]
        assert p["oc"] * positions <= device.vector_registers * device.lanes
        lanes = p["tw"] if schedule.template in ("rows", "depthwise") else p["oc"]
        assert lanes % device.lanes == 0 or lanes in (4, device.lanes // 4, device.lanes // 2)


def test_accumulators_leave_registers_for_what_is_read() -> None:
    workload = Workload.parse("conv 1x64x32x32 -> 64, kernel 3x3, pads 1,1,1,1, float32")
    for device in DEVICES:
        for schedule in spaces.space(workload, device):
            p = dict(schedule.params)
            vectors, others = (p["tw"], p["oc"]) if schedule.template == "rows" else (p["oc"], p["tw"])
            assert others * p["th"] * -(-vectors // device.lanes) <= device.vector_registers * 3 // 4


def test_tiles_waste_less_than_half() -> None:
    """The first choice for sizes that no vector divides: ranks, widths of 5, 15, 75."""
    device = DEVICES[2]
    for oc in (3, 5, 13, 17, 29, 37):
        for wide in (5, 7, 15, 20, 75):
            workload = Workload.parse(f"conv 1x16x{wide}x{wide} -> {oc}, kernel 3x3, pads 1,1,1,1, float32")
            p = dict(spaces.default(workload, device).params)
            done = -(-oc // p["oc"]) * p["oc"] * -(-wide // p["th"]) * p["th"] * -(-wide // p["tw"]) * p["tw"]
            assert done < 2 * oc * wide * wide


def test_groups_never_share_a_tile() -> None:
    workload = Workload.parse("conv 1x12x20x20 -> 36, kernel 3x3, groups 3, float32")
    for device in DEVICES:
        for schedule in spaces.space(workload, device):
            assert 12 % schedule["oc"] == 0


def test_cuda_has_no_template() -> None:
    device = Device({"kind": "cuda", "arch": "sm_80"}, "A100", 1, 32, 255)
    workload = Workload.parse("conv 1x16x32x32 -> 13, kernel 3x3, pads 1,1,1,1, float32")
    assert spaces.templates(workload, device) == ()
    assert spaces.space(workload, device) == [Schedule("plain")]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.model)
def test_a_neighbours_schedule_is_adapted(device: Device) -> None:
    of = Workload.parse("conv 1x16x32x32 -> 16, kernel 3x3, pads 1,1,1,1, float32")
    to = Workload.parse("conv 1x16x32x32 -> 15, kernel 3x3, pads 1,1,1,1, float32")
    for schedule in spaces.space(of, device)[:20]:
        assert spaces.adapted(schedule, of, of, device) == schedule
        found = spaces.adapted(schedule, of, to, device)
        assert found in spaces.space(to, device)
        assert found is not None and found.template == schedule.template
    linear = Workload.parse("linear 4x64 -> 64, float32")
    assert spaces.adapted(spaces.default(of, device), of, linear, device) is None


def test_a_plane_has_the_workloads_output() -> None:
    for key, template in KEYS.items():
        workload = Workload.parse(key)
        plane = Plane.of(workload)
        if plane is None:
            assert template in ((), ("dense",))
            continue
        spatial = (1, *workload.work.output_spatial)[-2:]
        shuffled = tuple(size * step for size, step in zip(plane.out, plane.shuffle, strict=True))
        # a transposed convolution's phases are cut where the output ends
        assert all(a >= b > a - s for a, b, s in zip(shuffled, spatial, plane.shuffle, strict=True))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pad", [0, 1])
def test_the_window_of_a_phase_by_brute_force(kernel: int, stride: int, pad: int) -> None:
    """Input i meets tap k at output i * stride + k - pad."""
    if pad >= kernel:
        return
    geometry = Geometry((kernel,), (stride,), (1,), (pad, 0), transposed=True)
    (size,) = geometry.output_spatial((9,))
    reads = [
        i - y // stride
        for y in range(4 * stride, min(5 * stride, size))
        for i in range(9)
        if 0 <= y - i * stride + pad < kernel
    ]
    assert phase_window(kernel, stride, pad) == (min(reads), max(max(reads), (stride - 1 + pad) // stride))
