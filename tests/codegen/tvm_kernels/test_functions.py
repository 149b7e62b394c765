"""What a network's functions become: anchors with what follows them, functions by rules, and what does not apply."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.tune import spaces
from codegen.tune.schedule import Schedule, ScheduleSource
from codegen.tune.workload import Workload
from codegen.tvm_kernels import apply
from codegen.tvm_kernels.anchor import Anchored, DoesNotFit
from codegen.tvm_kernels.apply import scheduled_with_notes
from codegen.tvm_kernels.build import anchored_kernel, fused, kernel_function
from codegen.tvm_kernels.imports import load_tvm
from codegen.tvm_kernels.legalize import legalized
from codegen.tvm_kernels.tensors import SCHEDULE, WORKLOAD
from passes.graph import Note
from tests.codegen.tvm_kernels.layers import host

pytest.importorskip("tvm")

Array = NDArray[Any]
Emit = Callable[[Any, Any], Any]


def lowered(
    shape: tuple[Any, ...], emit: Emit, source: ScheduleSource = lambda _: None
) -> tuple[Any, tuple[Note, ...]]:
    """``emit(bb, x)`` writes a network of one input; its functions scheduled for the host, and the notes."""
    tvm = load_tvm()
    from tvm import relax

    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(emit(bb, x))
        bb.emit_func_output(out)
    with tvm.target.Target(host().target):
        mod = fused(legalized(bb.get(), host(), source))
    return scheduled_with_notes(mod, host())


def computed(mod: Any, x: Array) -> Array:
    tvm = load_tvm()
    from tvm import relax

    machine = relax.VirtualMachine(tvm.compile(mod, target=tvm.target.Target(host().target)), tvm.cpu())
    result: Array = machine["main"](tvm.runtime.tensor(x)).numpy()
    return result


def functions(mod: Any) -> dict[str, str]:
    tvm = load_tvm()
    return {v.name_hint: f.script() for v, f in mod.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}


def constant(*shape: int, seed: int = 0) -> Any:
    load_tvm()
    from tvm import relax

    return relax.const(np.random.default_rng(seed).standard_normal(shape, np.float32))


def test_tvm_is_loaded_without_torch_and_leaves_inspect_as_it_was() -> None:
    code = (
        "import inspect, sys; before = inspect.stack;"
        "from codegen.tvm_kernels.imports import load_tvm; tvm = load_tvm();"
        "assert inspect.stack is before and 'torch' not in sys.modules and tvm.relax and tvm.s_tir.Schedule"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def residual(bb: Any, x: Any) -> Any:
    from tvm import relax

    y = bb.emit(relax.op.nn.conv2d(x, constant(8, 8, 3, 3), padding=(1, 1)))
    y = bb.emit(relax.op.add(bb.emit(relax.op.add(y, constant(1, 8, 1, 1))), x))
    return bb.emit(relax.op.nn.relu(y))


def swish(bb: Any, x: Any) -> Any:
    from tvm import relax

    y = bb.emit(relax.op.nn.conv2d(x, constant(8, 8, 1, 1)))
    return bb.emit(relax.op.multiply(y, bb.emit(relax.op.sigmoid(y))))


def gated(bb: Any, x: Any) -> Any:
    from tvm import relax

    y = bb.emit(relax.op.nn.conv2d(x, constant(8, 8, 3, 3), padding=(1, 1)))
    return bb.emit(relax.op.multiply(y, bb.emit(relax.op.sigmoid(x))))


def clamped_before(bb: Any, x: Any) -> Any:
    from tvm import relax

    return bb.emit(relax.op.nn.conv2d(bb.emit(relax.op.nn.relu(x)), constant(8, 8, 3, 3), padding=(1, 1)))


def in_torch(emit: Emit, x: Array) -> Array:
    import torch
    from torch.nn import functional

    value = torch.from_numpy(x).double()

    def weight(*shape: int) -> Any:
        return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32)).double()

    if emit is residual:
        y = functional.conv2d(value, weight(8, 8, 3, 3), padding=1) + weight(1, 8, 1, 1) + value
        y = functional.relu(y)
    elif emit is swish:
        y = functional.silu(functional.conv2d(value, weight(8, 8, 1, 1)))
    elif emit is gated:
        y = functional.conv2d(value, weight(8, 8, 3, 3), padding=1) * torch.sigmoid(value)
    else:
        y = functional.conv2d(functional.relu(value), weight(8, 8, 3, 3), padding=1)
    result: Array = y.numpy()
    return result


@pytest.mark.parametrize("emit", [residual, swish, gated, clamped_before])
@pytest.mark.parametrize("alone", [False, True])
def test_what_stands_around_an_anchor_is_computed_with_it(
    emit: Emit, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``alone``: as where the template cannot take what follows into its loops."""
    if alone:
        monkeypatch.setattr(apply, "_template", apply._template_apart)
    mod, notes = lowered((1, 8, 9, 10), emit)
    assert not notes
    assert len(functions(mod)) == (2 if emit is clamped_before else 1)
    x = np.random.default_rng(1).standard_normal((1, 8, 9, 10), np.float32)
    np.testing.assert_allclose(computed(mod, x), in_torch(emit, x), rtol=0, atol=2e-5)


def test_annotations_hold_the_workload_and_its_schedule() -> None:
    workload = Workload.parse("conv 1x8x9x10 -> 8, kernel 3x3, pads 1,1,1,1, float32")
    wanted = spaces.space(workload, host())[5]
    asked: list[Workload] = []

    def source(workload: Workload) -> Schedule:
        asked.append(workload)
        return wanted

    mod, _ = lowered((1, 8, 9, 10), residual, source)
    assert asked == [workload]
    (text,) = functions(mod).values()
    assert json.dumps(workload.key) in text and WORKLOAD in text and SCHEDULE in text
    anchored = anchored_kernel(workload, wanted, host())
    assert (anchored.workload, anchored.schedule) == (workload, wanted)


def test_a_schedule_of_a_template_that_does_not_take_the_layer_gives_way_to_the_default() -> None:
    workload = Workload.parse("conv 1x8x9x10 -> 8, kernel 3x3, pads 1,1,1,1, float32")
    mod, notes = lowered((1, 8, 9, 10), residual, lambda _: Schedule.of("dense", oc=16, tw=1, unroll=0))
    assert not notes
    default = json.dumps(json.dumps(spaces.default(workload, host()).to_json(), sort_keys=True))
    assert default in next(iter(functions(mod).values()))


def test_functions_fall_back_to_simpler_schedules_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise DoesNotFit("not today")

    x = np.random.default_rng(1).standard_normal((1, 8, 9, 10), np.float32)
    expected = in_torch(residual, x)
    monkeypatch.setattr(apply, "TEMPLATES", dict.fromkeys(apply.TEMPLATES, refuse))
    mod, notes = lowered((1, 8, 9, 10), residual)
    assert [(note.op, note.reason) for note in notes] == [
        ("template", "DoesNotFit: not today"),
        ("template_apart", "DoesNotFit: not today"),
    ]
    assert {note.node for note in notes} == set(functions(mod))
    np.testing.assert_allclose(computed(mod, x), expected, rtol=0, atol=2e-5)
    monkeypatch.setattr(apply.rules, "schedule", refuse)
    mod, notes = lowered((1, 8, 9, 10), residual)
    assert [note.op for note in notes] == ["template", "template_apart", "refuse"]
    np.testing.assert_allclose(computed(mod, x), expected, rtol=0, atol=2e-5)


def products() -> Mapping[str, tuple[tuple[int, ...], Emit, Callable[[Array], Array], int]]:
    """Name: input shape, network, what it computes in float64, and how many anchors it has."""
    from tvm import relax

    def fixed(*shape: int, seed: int = 0) -> Array:
        return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(np.float64)

    def right(bb: Any, x: Any) -> Any:
        return bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, constant(12, 9))), constant(9, seed=1)))

    def turned(bb: Any, x: Any) -> Any:
        return bb.emit(relax.op.matmul(x, bb.emit(relax.op.permute_dims(constant(9, 12)))))

    def left(bb: Any, x: Any) -> Any:
        return bb.emit(relax.op.matmul(constant(9, 6), x))

    def itself(bb: Any, x: Any) -> Any:
        return bb.emit(relax.op.matmul(x, bb.emit(relax.op.permute_dims(x, [0, 2, 1]))))

    return {
        "right": ((2, 3, 12), right, lambda x: x @ fixed(12, 9) + fixed(9, seed=1), 1),
        "vectors": ((1, 12), right, lambda x: x @ fixed(12, 9) + fixed(9, seed=1), 1),
        "left": ((2, 6, 20), left, lambda x: fixed(9, 6) @ x, 1),
        "matrix": ((6, 20), left, lambda x: fixed(9, 6) @ x, 1),
        "itself": ((2, 5, 7), itself, lambda x: x @ x.transpose(0, 2, 1), 0),
        "turned": ((4, 12), turned, lambda x: x @ fixed(9, 12).T, 0),
    }


@pytest.mark.parametrize("name", ["right", "vectors", "left", "matrix", "itself", "turned"])
def test_products_are_numpys(name: str) -> None:
    load_tvm()
    shape, emit, expected, anchors = products()[name]
    mod, notes = lowered(shape, emit)
    assert not notes
    assert sum(WORKLOAD in text for text in functions(mod).values()) == anchors
    x = np.random.default_rng(3).standard_normal(shape, np.float32)
    np.testing.assert_allclose(computed(mod, x), expected(x.astype(np.float64)), rtol=0, atol=2e-5)


def test_symbolic_shapes_are_left_to_tvm() -> None:
    tvm = load_tvm()
    from tvm import relax

    def emit(bb: Any, x: Any) -> Any:
        return bb.emit(relax.op.nn.relu(bb.emit(relax.op.nn.conv2d(x, constant(5, 3, 3, 3)))))

    mod, notes = lowered((tvm.tirx.Var("n", "int64"), 3, 8, 8), emit)
    assert not notes
    x = np.random.default_rng(3).standard_normal((2, 3, 8, 8), np.float32)
    import torch

    weight = np.random.default_rng(0).standard_normal((5, 3, 3, 3), np.float32)
    expected = torch.relu(torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(weight).double()))
    np.testing.assert_allclose(computed(mod, x), expected.numpy(), rtol=0, atol=2e-5)


def operators() -> Mapping[str, tuple[tuple[int, ...], Emit, Callable[[Any], Any]]]:
    """Name: input shape, network of TVM's operators, the same of torch's."""
    import torch
    from torch.nn import functional
    from tvm import relax

    op = relax.op
    return {
        "max pool": (
            (1, 8, 17, 17),
            lambda bb, x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)),
            lambda x: functional.max_pool2d(x, 3, 2, 1),
        ),
        "average pool": (
            (1, 8, 16, 16),
            lambda bb, x: op.nn.avg_pool2d(x, (7, 7), (1, 1)),
            lambda x: functional.avg_pool2d(x, 7, 1),
        ),
        "mean": ((1, 40, 7, 7), lambda bb, x: op.mean(x, [2, 3], True), lambda x: x.mean((2, 3), keepdim=True)),
        "sum of rows": ((64, 33), lambda bb, x: op.sum(x, [0]), lambda x: x.sum(0)),
        "largest": ((6, 100), lambda bb, x: op.argmax(x, 1), lambda x: x.argmax(1)),
        "softmax": ((5, 48), lambda bb, x: op.nn.softmax(x, -1), lambda x: functional.softmax(x, -1)),
        "softmax of channels": ((1, 10, 4, 5), lambda bb, x: op.nn.softmax(x, 1), lambda x: functional.softmax(x, 1)),
        "layer norm": (
            (3, 7, 64),
            lambda bb, x: op.nn.layer_norm(x, constant(64), constant(64, seed=1), [-1]),
            lambda x: functional.layer_norm(
                x,
                (64,),
                torch.from_numpy(np.random.default_rng(0).standard_normal(64, np.float32)).double(),
                torch.from_numpy(np.random.default_rng(1).standard_normal(64, np.float32)).double(),
            ),
        ),
        "transpose": ((3, 20, 33), lambda bb, x: op.permute_dims(x, [2, 0, 1]), lambda x: x.permute(2, 0, 1)),
        "concatenate": (
            (1, 6, 8, 8),
            lambda bb, x: op.concat([x, op.nn.relu(x)], 1),
            lambda x: torch.cat([x, x.relu()], 1),
        ),
        "one axis": ((77,), lambda bb, x: op.exp(x), lambda x: x.exp()),
        "scalar": ((), lambda bb, x: op.exp(x), lambda x: x.exp()),
        "scan": ((4, 9), lambda bb, x: op.cumsum(x, 1), lambda x: x.cumsum(1)),
        "resize": (
            (1, 4, 5, 6),
            lambda bb, x: op.image.resize2d(
                x, relax.ShapeExpr([10, 12]), None, "NCHW", "nearest_neighbor", "asymmetric", "floor"
            ),
            lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"),
        ),
        "3-D convolution": (
            (1, 2, 5, 6, 8),
            lambda bb, x: op.nn.conv3d(x, constant(3, 2, 3, 3, 3), padding=(1, 1, 1)),
            lambda x: functional.conv3d(
                x,
                torch.from_numpy(np.random.default_rng(0).standard_normal((3, 2, 3, 3, 3), np.float32)).double(),
                padding=1,
            ),
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("max pool", "average pool", "mean", "sum of rows", "largest", "softmax", "softmax of channels", "layer norm"),
        *("transpose", "concatenate", "one axis", "scalar", "scan", "resize", "3-D convolution"),
    ],
)
def test_rules_keep_what_an_operator_computes(name: str) -> None:
    import torch

    load_tvm()
    shape, emit, expected = operators()[name]
    mod, notes = lowered(shape, lambda bb, x: bb.emit(emit(bb, x)))
    assert not notes
    x = np.asarray(np.random.default_rng(3).standard_normal(shape, np.float32))
    np.testing.assert_allclose(computed(mod, x), expected(torch.from_numpy(x).double()).numpy(), rtol=0, atol=2e-5)


def test_rules_vectorize_neighbours_and_share_large_results() -> None:
    from codegen.tune.device import Device

    tvm = load_tvm()
    from tvm import te

    x = te.placeholder((4, 100, 400), "float32")
    together = te.create_prim_func([x, te.compute((4, 100, 400), lambda i, j, k: x[i, j, k] * 2)])
    turned = te.create_prim_func([x, te.compute((400, 4, 100), lambda k, i, j: x[i, j, k] * 2)])
    alone = host()
    device = Device({**alone.target, "num-cores": 2}, alone.model, 2, alone.vector_bits, alone.vector_registers)
    mod, notes = scheduled_with_notes(tvm.IRModule({"together": together, "turned": turned}), device)
    assert not notes
    texts = functions(mod)
    assert f"T.vectorized({device.lanes})" in texts["together"].replace("T.int64(", "(").replace("((", "(").replace(
        "))", ")"
    )
    assert all("T.parallel" in text for text in texts.values())


def test_nothing_that_is_handed_in_is_changed() -> None:
    tvm = load_tvm()
    from tvm import te

    x = te.placeholder((4, 32), "float32")
    function = te.create_prim_func([x, te.compute((4, 32), lambda i, j: x[i, j] + 1)])
    mod = tvm.IRModule({"f": function.with_attr("global_symbol", "f")})
    before = mod.script()
    scheduled_with_notes(mod, host())
    assert mod.script() == before


def test_two_anchors_in_one_function_are_not_for_a_template() -> None:
    workload = Workload.parse("linear 2x8 -> 5, float32")
    function, _ = kernel_function(workload, spaces.default(workload, host()), host())
    tvm = load_tvm()
    sketch = tvm.s_tir.Schedule(tvm.IRModule({"main": function}))
    with pytest.raises(DoesNotFit, match="2 anchors"):  # scheduled already: the sum has its zeros apart
        Anchored.of(sketch)
