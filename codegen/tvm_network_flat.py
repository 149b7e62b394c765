"""One function in place of the virtual machine's program, for networks of fixed shapes.

Relax's virtual machine takes about 0.13 us an operator: it makes a tensor object, looks up a function and drops
tensors. Here the whole of ``main`` becomes one function of the library that calls the kernels one after the other, at
about 0.01 us each, on parts of one workspace that are planned in advance. The virtual machine calls it and is left with
the inputs, the outputs and the workspace; what it cannot hold (symbolic shapes, branches, external functions) stays as
it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENTRY = "rankc_network"
_ALIGNMENT_BYTES = 64


class Unsuited(Exception):
    """``main`` holds what has no place in a function of kernel calls; the message says what."""


@dataclass(eq=False)
class _Storage:
    """Memory of a tensor. ``parent`` and ``offset``: where it lies in another one, in values of the same type."""

    dtype: str
    size: int
    parent: _Storage | None = None
    offset: int = 0

    def root(self) -> tuple[_Storage, int]:
        if self.parent is None:
            return self, self.offset
        root, offset = self.parent.root()
        return root, offset + self.offset


@dataclass(eq=False)
class _Value:
    """A tensor of the network: memory, and the shape that it is seen with."""

    storage: _Storage
    shape: tuple[int, ...]
    name: str


@dataclass(eq=False)
class _Step:
    kernel: str
    inputs: list[_Value]
    outputs: list[_Value]
    joined_axis: int | None


@dataclass(eq=False)
class _Program:
    """``main`` as read: its steps, and the tensors that come from outside and leave."""

    steps: list[_Step] = field(default_factory=list)
    parameters: list[_Value] = field(default_factory=list)
    constants: list[tuple[Any, _Value]] = field(default_factory=list)
    results: list[_Value] = field(default_factory=list)
    is_tuple: bool = False


def flattened(mod: Any) -> tuple[Any, Counter[str] | None, str]:
    """``mod``, an IRModule of scheduled functions, with a ``main`` that calls one function; the calls in it; and "".

    Where that cannot be: ``mod`` as it is, None, and the reason.
    """
    from tvm import relax

    aliased = relax.transform.RewriteDataflowReshape()(mod)
    try:
        program = _read(aliased)
        _join(program)
        return _rebuilt(mod, program), Counter(step.kernel for step in program.steps), ""
    except Unsuited as reason:
        return mod, None, str(reason)


def _read(mod: Any) -> _Program:
    from tvm import relax
    from tvm.ir import GenericConst

    main = mod["main"]
    program = _Program()
    values: dict[Any, Any] = {}
    for parameter in main.params:
        value = _new(parameter.ty, parameter.name)
        values[parameter] = value
        program.parameters.append(value)
    constants: dict[Any, _Value] = {}

    def known(expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return tuple(known(part) for part in expr.fields)
        if isinstance(expr, GenericConst):
            if expr not in constants:
                constants[expr] = _new(expr.ty, f"constant_{len(constants)}")
                program.constants.append((expr, constants[expr]))
            return constants[expr]
        if expr not in values:
            raise Unsuited(f"{type(expr).__name__} is no tensor of main")
        return values[expr]

    for binding in _bindings(main):
        expr, name = binding.value, binding.var.name
        if isinstance(expr, relax.TupleGetItem):
            values[binding.var] = known(expr.tuple_value)[int(expr.index)]
        elif not isinstance(expr, relax.Call):
            values[binding.var] = known(expr)
        elif _op(expr) == "relax.reshape":
            value = known(expr.args[0])
            values[binding.var] = _Value(value.storage, _shape(binding.var.ty), name)
        elif _op(expr) == "relax.call_tir" and len(expr.args) == 2:
            several = isinstance(expr.ty, relax.TupleType)
            made = [_new(ty, name) for ty in (expr.ty.fields if several else [expr.ty])]
            inputs = [known(part) for part in expr.args[1].fields]
            kernel = expr.args[0].name_hint
            axis = _joined_axis(kernel, mod[expr.args[0]], inputs, made[0])
            program.steps.append(_Step(kernel, inputs, made, axis))
            values[binding.var] = tuple(made) if several else made[0]
        else:
            raise Unsuited(f"{_op(expr)} is no call of a kernel")
    result = known(main.body.body)
    program.is_tuple = isinstance(result, tuple)
    program.results = list(result) if program.is_tuple else [result]
    if any(isinstance(value, tuple) for value in program.results):
        raise Unsuited("main returns tuples in a tuple")
    storages = [value.storage for value in program.results]
    computed = {out.storage for step in program.steps for out in step.outputs}
    if len(set(storages)) != len(storages) or not set(storages) <= computed:
        raise Unsuited("main returns a tensor twice, or one that no kernel makes")
    return program


def _bindings(main: Any) -> Iterator[Any]:
    for block in main.body.blocks:
        yield from block.bindings


def _op(call: Any) -> str:
    return str(getattr(call.op, "name", getattr(call.op, "name_hint", type(call.op).__name__)))


def _shape(ty: Any) -> tuple[int, ...]:
    shape = getattr(ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        raise Unsuited("a tensor has no known shape")
    sizes = []
    for size in shape.values:
        value = getattr(size, "value", size)
        if not isinstance(value, int):
            raise Unsuited("a shape is symbolic")
        sizes.append(value)
    return tuple(sizes)


def _new(ty: Any, name: str) -> _Value:
    shape = _shape(ty)
    try:
        np.dtype(str(ty.dtype))
    except TypeError as error:
        raise Unsuited(f"{name} is of {ty.dtype}") from error
    return _Value(_Storage(str(ty.dtype), prod(shape)), shape, name)


def _joined_axis(name: str, function: Any, inputs: list[_Value], out: _Value) -> int | None:
    """The axis, where a function does nothing but join its inputs: TVM's own, with nothing fused into it."""
    from tvm import s_tir

    if not re.fullmatch(r"concatenate\d*", name):
        return None
    sketch = s_tir.Schedule(function)
    blocks = sketch.get_child_blocks(sketch.get_sblock("root"))
    ranks = {len(value.shape) for value in (*inputs, out)}
    if len(blocks) != 1 or len(ranks) != 1:
        return None
    sizes = [(*(value.shape[axis] for value in inputs),) for axis in range(len(out.shape))]
    axes = [axis for axis, of in enumerate(sizes) if set(of) != {out.shape[axis]}]
    return axes[0] if len(axes) == 1 and sum(sizes[axes[0]]) == out.shape[axes[0]] else None


def _join(program: _Program) -> None:
    """Tensors that are only joined along the outermost axis are computed where they belong, and the join goes."""
    from_outside = {value.storage for value in program.results}
    from_outside |= {value.storage for value in program.parameters}
    from_outside |= {value.storage for _, value in program.constants}
    left = []
    for step in program.steps:
        inputs, out = [value.storage for value in step.inputs], step.outputs[0].storage
        axis, grain = step.joined_axis, _ALIGNMENT_BYTES // np.dtype(out.dtype).itemsize
        offsets = [sum(storage.size for storage in inputs[:index]) for index in range(len(inputs))]
        if (
            axis is not None
            and prod(step.outputs[0].shape[:axis]) == 1
            and sum(storage.size for storage in inputs) == out.size
            and len(set(inputs)) == len(inputs)
            and all(storage.parent is None and storage not in from_outside for storage in inputs)
            and all(offset % grain == 0 for offset in offsets)
        ):
            for storage, offset in zip(inputs, offsets, strict=True):
                storage.parent, storage.offset = out, offset
        else:
            left.append(step)
    program.steps = left


def _planned(program: _Program, given: dict[_Storage, Any]) -> tuple[dict[_Storage, int], dict[str, int]]:
    """The place of each tensor in the workspace of its type, in values, and each workspace's size."""
    spans: dict[_Storage, list[int]] = {}
    for index, step in enumerate(program.steps):
        for value in (*step.inputs, *step.outputs):
            root = value.storage.root()[0]
            if root not in given:
                spans.setdefault(root, [index, index])[1] = index
    places: dict[_Storage, int] = {}
    sizes: dict[str, int] = {}
    for storage in sorted(spans, key=lambda s: (-s.size, spans[s])):
        first, last = spans[storage]
        grain = _ALIGNMENT_BYTES // np.dtype(storage.dtype).itemsize
        busy = sorted(
            (place, place + other.size)
            for other, place in places.items()
            if other.dtype == storage.dtype and spans[other][0] <= last and first <= spans[other][1]
        )
        place = 0
        for begin, end in busy:
            if place + storage.size <= begin:
                break
            place = max(place, -(-end // grain) * grain)
        places[storage] = place
        sizes[storage.dtype] = max(sizes.get(storage.dtype, 0), place + storage.size)
    return places, sizes


def _packed(program: _Program) -> dict[_Storage, NDArray[Any]]:
    """One array for all constants of a type, of which they become parts: one argument instead of hundreds."""
    lists: dict[str, list[NDArray[Any]]] = {}
    whole: dict[str, _Storage] = {}
    for constant, value in program.constants:
        storage = value.storage
        dtype = np.dtype(storage.dtype)
        grain = _ALIGNMENT_BYTES // dtype.itemsize
        padded = np.zeros(-(-max(storage.size, 1) // grain) * grain, dtype)
        padded[: storage.size] = constant.value.numpy().ravel()
        storage.parent = whole.setdefault(storage.dtype, _Storage(storage.dtype, 0))
        storage.offset = storage.parent.size
        storage.parent.size += padded.size
        lists.setdefault(storage.dtype, []).append(padded)
    if any(storage.size >= 2**31 for storage in whole.values()):
        raise Unsuited("the weights have 2 G values or more")
    return {storage: np.concatenate(lists[dtype]) for dtype, storage in whole.items()}


def _rebuilt(mod: Any, program: _Program) -> Any:
    """The module with the function of calls, the kernels that it calls, and a ``main`` around it."""
    import tvm
    from tvm import relax, tirx
    from tvm.tirx.stmt import DeclBuffer, Evaluate, SeqStmt

    def buffer(shape: tuple[int, ...], dtype: str, name: str) -> Any:
        return tirx.decl_buffer(shape, dtype, name=name, layout=None)

    weights = _packed(program)
    given = {value.storage: buffer(value.shape, value.storage.dtype, value.name) for value in program.parameters}
    given |= {s: buffer(values.shape, s.dtype, f"weights_{s.dtype}") for s, values in weights.items()}
    given |= {v.storage: buffer(v.shape, v.storage.dtype, f"result_{i}") for i, v in enumerate(program.results)}
    places, sizes = _planned(program, given)
    workspaces = {dtype: buffer((size,), dtype, f"workspace_{dtype}") for dtype, size in sizes.items()}
    body: list[Any] = []
    views: dict[tuple[_Storage, tuple[int, ...]], Any] = {}

    def view(value: _Value) -> Any:
        root, offset = value.storage.root()
        whole = given.get(root)
        if whole is not None and root is value.storage and tuple(map(int, whole.shape)) == value.shape:
            return whole
        key = (value.storage, value.shape)
        if key not in views:
            if whole is None:
                start = workspaces[root.dtype][places[root] + offset]
            else:
                start = whole[np.unravel_index(offset, tuple(map(int, whole.shape)))] if whole.shape else whole[()]
            views[key] = buffer(value.shape, value.storage.dtype, value.name)
            body.append(DeclBuffer(views[key], data=tirx.address_of(start)))
        return views[key]

    for step in program.steps:
        arguments = [view(value) for value in (*step.inputs, *step.outputs)]
        body.append(Evaluate(tirx.call_cpacked(step.kernel, *arguments)))
    parameters = [*given.values(), *workspaces.values()]
    function = tirx.PrimFunc(parameters, SeqStmt(body) if len(body) > 1 else body[0])
    function = function.with_attr({"tirx.noalias": True, "s_tir": True, "global_symbol": ENTRY})

    called = {step.kernel for step in program.steps}
    functions = {
        variable: kernel.with_attr("global_symbol", variable.name_hint)
        for variable, kernel in mod.functions.items()
        if variable.name_hint in called
    }
    builder = relax.BlockBuilder(tvm.IRModule(functions, attrs=mod.attrs))
    entry = builder.add_func(function, ENTRY)
    old = mod["main"]
    variables = [relax.Var(parameter.name, parameter.ty) for parameter in old.params]
    outs = [relax.TensorType(v.shape, v.storage.dtype) for v in program.results]
    outs += [relax.TensorType((size,), dtype) for dtype, size in sizes.items()]
    with builder.function("main", variables, dict(old.attrs) if old.attrs else {}):
        # no dataflow block: TVM looks for reshapes in those, and expects nothing but blocks of tensor programs
        arguments = relax.Tuple([*variables, *(relax.const(values, s.dtype) for s, values in weights.items())])
        made = builder.emit(relax.call_tir(entry, arguments, outs if len(outs) > 1 else outs[0]))
        parts = [made] if len(outs) == 1 else [relax.TupleGetItem(made, i) for i in range(len(program.results))]
        builder.emit_func_output(builder.emit(relax.Tuple(parts)) if program.is_tuple else parts[0])
    return builder.get()
