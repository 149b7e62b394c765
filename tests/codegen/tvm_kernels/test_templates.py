from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.tune import spaces
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from codegen.tvm_kernels.build import build_kernel, kernel_function
from passes.core.cost import StageWork
from passes.core.site import Geometry
from tests.codegen.tvm_kernels.layers import AVX2, NEON, SSE, ZNVER4, host, relative_error

pytest.importorskip("tvm")

TOLERANCE = 1e-5
"""Sums of at most some hundred products in float32, in another order than the reference's in float64."""


@st.composite
def convolutions(draw: st.DrawFn) -> Workload:
    """Small convolutions with sizes that no vector divides, uneven pads, strides, dilations, groups."""
    n = draw(st.integers(1, 2))
    transposed = draw(st.integers(0, 4)) == 0
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    ic, oc = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 4, 8, 13, 17]))
    if draw(st.integers(0, 4)) == 0:  # depthwise, with one or two results of each channel
        groups, ic, oc = draw(st.integers(2, 7)), 1, draw(st.integers(1, 2))
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 5])) for _ in range(n))
    strides = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(n))
    dilations = (1,) * n if transposed else tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(n))
    pads = tuple(draw(st.integers(0, min(2, kernel[i % n] - 1))) for i in range(2 * n))
    extra = tuple(draw(st.integers(0, s - 1)) for s in strides) if transposed else ()
    geometry = Geometry(kernel, strides, dilations, pads, groups, transposed, extra)
    spatial = tuple(draw(st.sampled_from([5, 7, 8, 10, 15, 16, 20, 33])) for _ in range(n))
    while min(geometry.output_spatial(spatial)) < 1:
        spatial = tuple(size + 4 for size in spatial)
    return Workload.of(StageWork(geometry, groups * ic, groups * oc, spatial, draw(st.sampled_from([1, 1, 2]))))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(convolutions(), st.randoms(use_true_random=False))
def test_a_convolution_by_any_schedule_of_its_space_is_torchs(workload: Workload, random: object) -> None:
    space = spaces.space(workload, host())
    schedule = space[random.choice([0, random.randrange(len(space))])]  # type: ignore[attr-defined]
    assert relative_error(workload, schedule, host()) < TOLERANCE


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.randoms(use_true_random=False))
def test_a_product_by_any_schedule_of_its_space_is_torchs(rows: int, k: int, out: int, random: object) -> None:
    workload = Workload.of(StageWork(Geometry(), k, out, (), rows))
    schedule = random.choice(spaces.space(workload, host()))  # type: ignore[attr-defined]
    assert relative_error(workload, schedule, host()) < TOLERANCE


@pytest.mark.parametrize(
    "key",
    [
        "conv 1x3x4x5 -> 3, kernel 3x3, pads 1,1,1,1, float32",
        "conv 1x6x4x5 -> 6, kernel 3x3, strides 2,2, pads 1,1,1,1, groups 6, float32",
        "conv 1x6x3x3 -> 9, kernel 1x1, float32",
        "linear 3x9 -> 21, float32",
    ],
)
def test_each_kind_of_schedule_in_a_space_computes_the_layer(key: str) -> None:
    """Of each template every value of every parameter, where no other schedule stands for it already."""
    workload = Workload.parse(key)
    space = spaces.space(workload, host())
    seen: Counter[object] = Counter()
    chosen = []
    for schedule in sorted(space, key=lambda s: (s.template, s.params)):
        values = [(schedule.template, *param) for param in schedule.params]
        if any(not seen[value] for value in values):
            chosen.append(schedule)
            seen.update(values)
    assert len(chosen) >= 2
    for schedule in chosen:
        assert relative_error(workload, schedule, host()) < TOLERANCE, schedule


LAYERS = (
    "conv 1x16x32x32 -> 13, kernel 3x3, pads 1,1,1,1, float32",
    "conv 1x32x15x15 -> 32, kernel 3x3, strides 2,2, pads 1,1,1,1, groups 32, float32",
    "conv 2x16x7x7 -> 20, kernel 1x1, float32",
    "conv 1x12x75 -> 16, kernel 3, pads 1,1, groups 2, float32",
    "conv_transpose 1x8x8x8 -> 6, kernel 3x3, strides 2,2, pads 1,1,1,1, output_padding 1,1, float32",
    "linear 1x100 -> 75, float32",
)


@pytest.mark.parametrize(
    ("device", "register", "multiply_add"),
    [(SSE, "%xmm", "mulps"), (AVX2, "%ymm", "vfmadd"), (ZNVER4, "%[yz]mm", "vfmadd"), (NEON, r"\.4s", "fmla")],
    ids=lambda value: getattr(value, "model", value),
)
@pytest.mark.parametrize("key", LAYERS)
def test_defaults_use_the_vectors_of_processors_that_are_elsewhere(
    device: Device, register: str, multiply_add: str, key: str
) -> None:
    workload = Workload.parse(key)
    assembly = build_kernel(workload, spaces.default(workload, device), device).mod.inspect_source("asm")
    sums = [line for line in assembly.splitlines() if line.strip().startswith(multiply_add) and "ss" not in line[:16]]
    assert sums
    wide = sum(re.search(register, line) is not None for line in sums)
    assert wide >= len(sums) / 2, f"{wide} of {len(sums)}"


def test_several_threads_share_a_layer_and_find_the_same() -> None:
    alone = host()
    device = Device({**alone.target, "num-cores": 2}, alone.model, 2, alone.vector_bits, alone.vector_registers)
    for key, order in (
        ("conv 1x16x40x40 -> 16, kernel 3x3, pads 1,1,1,1, float32", "f"),
        ("conv 1x16x40x40 -> 16, kernel 3x3, pads 1,1,1,1, float32", "y"),
        ("conv 2x16x40x40 -> 16, kernel 3x3, pads 1,1,1,1, float32", "f"),
        ("linear 64x128 -> 200, float32", "f"),
    ):
        workload = Workload.parse(key)
        space = spaces.space(workload, device)
        schedule = next(s for s in space if dict(s.params).get("order", "f") == order)
        function, notes = kernel_function(workload, schedule, device)
        assert not notes
        assert "T.parallel" in function.script()
        assert "T.parallel" not in kernel_function(workload, schedule, alone)[0].script()
        assert relative_error(workload, schedule, device) < TOLERANCE


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    workload = Workload.parse("conv 1x4x9x7 -> 6, kernel 3x3, groups 2, float32")
    across_groups = Schedule.of("rows", oc=2, th=1, tw=8, order="f", unroll=1)
    with pytest.raises(ValueError, match="does not apply"):
        build_kernel(workload, across_groups, host())
