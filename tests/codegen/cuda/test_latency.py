"""The roofline against its formula, worked out here for one GPU; the table of GPUs against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from codegen.cuda_gpus import DEFAULT, GPUS, gpu_for
from codegen.cuda_latency import LAUNCH_S, CudaRoofline
from passes.core.cost import Kind, OpWork, StageWork
from passes.core.site import Geometry
from passes.errors import UsageError

A100 = CudaRoofline(GPUS["a100"])
LARGE = StageWork(Geometry((3, 3), pads=(1, 1, 1, 1)), 256, 256, (56, 56), batch=32)
LINEAR = StageWork(Geometry(), 4096, 4096)


def as_op(stage: StageWork, name: str = "n") -> OpWork:
    shapes = ((stage.batch, stage.in_channels, *stage.spatial), (stage.batch, stage.out_channels, *stage.spatial))
    count = stage.weights + stage.out_channels
    return OpWork(name, "Conv", stage, shapes[:1], shapes[1:], (f"{name}.in",), (f"{name}.out",), count, 4 * count)


def test_arithmetic_bounds_a_large_convolution() -> None:
    (cost,) = A100.chains([(LARGE,)])
    macs = 32 * 56 * 56 * 256 * 256 * 9
    assert cost.macs == macs and cost.kind is Kind.ESTIMATED and cost.unit == "s" and cost.energy_pj == 0
    # 19.5e12 operations a second, two to a multiply-add
    assert cost.latency == pytest.approx(LAUNCH_S + 2 * macs / 19.5e12, rel=1e-12)


def test_weights_bound_a_matrix_times_a_vector() -> None:
    (cost,) = A100.chains([(LINEAR,)])
    moved = 4 * (4096 * 4096 + 4096 + 4096 + 4096)  # weights, bias, input, output
    assert cost.dram_bytes == moved
    assert cost.latency == pytest.approx(LAUNCH_S + moved / 2039e9, rel=1e-12)


def test_a_chain_is_a_kernel_a_stage() -> None:
    narrow = replace(LARGE, out_channels=8), replace(LARGE, in_channels=8)
    (chain,), apart = A100.chains([narrow]), A100.chains([(stage,) for stage in narrow])
    assert chain == apart[0] + apart[1]


def test_small_layers_are_bound_by_their_launch() -> None:
    """What a GPU gives back at batch 1 for fewer MACs: nothing, and a launch more."""
    tiny = StageWork(Geometry((3, 3), pads=(1, 1, 1, 1)), 16, 16, (8, 8))
    chain = replace(tiny, out_channels=2), replace(tiny, in_channels=2)
    dense, low = (cost.latency for cost in A100.chains([(tiny,), chain]))
    assert dense < 1.1 * LAUNCH_S and low > 1.9 * dense


def test_what_is_fused_costs_its_further_operands_alone() -> None:
    conv = as_op(LARGE, "a")
    shape = conv.output_shapes[0]
    relu = OpWork("r", "Relu", None, (shape,), (shape,), ("a.out",), ("r",))
    add = OpWork("s", "Add", None, (shape, shape), (shape,), ("r", "a.in"), ("s",))
    pool = OpWork("p", "MaxPool", None, (shape,), (shape,), ("s",), ("p",))
    flat = OpWork("f", "Flatten", None, (shape,), ((32, 802816),), ("p",), ("f",))
    costs = A100.layers([conv, relu, add, pool, flat])
    map_bytes = 4 * 32 * 256 * 56 * 56
    assert [cost.latency for cost in costs[1:]] == pytest.approx(
        [0, map_bytes / 2039e9, LAUNCH_S + 2 * map_bytes / 2039e9, 0], rel=1e-12, abs=0
    )
    assert A100.network([conv, relu, add, pool, flat]).latency == pytest.approx(
        sum(c.latency for c in costs), rel=1e-12
    )


def test_the_floor_is_the_sum_of_the_least() -> None:
    conv, head = as_op(LARGE, "a"), as_op(replace(LARGE, spatial=(28, 28)), "b")
    low = replace(LARGE, out_channels=8), replace(LARGE, in_channels=8)
    floor = A100.floor([conv, head], {"a": [(LARGE,), low]})
    best = min(cost.latency for cost in A100.chains([(LARGE,), low]))
    assert floor.latency == pytest.approx(best + A100.layers([head])[0].latency, rel=1e-12)
    assert A100.floor([], {}).latency == A100.network([]).latency == 0


def test_a_faster_gpu_is_never_slower() -> None:
    for stage in (LARGE, LINEAR):
        old, new = (CudaRoofline(GPUS[name]).chains([(stage,)])[0].latency for name in ("a100", "h200"))
        assert new < old


def test_gpus_are_found_by_name_and_architecture() -> None:
    assert gpu_for({}) is GPUS[DEFAULT]
    assert gpu_for({"gpu": "H100"}).arch == "sm_90"
    assert gpu_for({"arch": "sm_86"}).arch == "sm_86"
    assert gpu_for({"gpu": "t4", "arch": "sm_75"}).name == "T4"
    assert gpu_for({"arch": "sm_80"}).target["arch"] == "sm_80"
    assert gpu_for({}).device().key.startswith("NVIDIA A100")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mcpu": "x"}, "a CUDA target has no option 'mcpu': gpu, arch"),
        ({"arch": "80"}, "arch=80: an architecture is written sm_80"),
        ({"arch": "sm_30"}, "arch=sm_30: no GPU of that architecture is known; there are sm_70, sm_75, "),
        ({"gpu": "h10"}, "gpu=h10: no such GPU is known; there are h100, "),
        ({"gpu": "a100", "arch": "sm_90"}, "gpu=a100 has arch=sm_80, not sm_90: give one of both"),
    ],
)
def test_other_options_are_refused_with_what_there_is(options: dict[str, str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        gpu_for(options)
    assert str(caught.value).startswith(line)
