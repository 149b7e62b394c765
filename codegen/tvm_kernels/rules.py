"""Schedules by rules, for the functions that no template takes: elementwise operators, pooling, reductions, the rest.

An elementwise block's loops over neighbours in memory become one loop, in vectors; a reduction walks over its axes
outside a vector of neighbouring results, or sums several results at once where neighbours are what it sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from math import prod
from typing import Any

from codegen.tune.device import Device

_SPATIAL, _REDUCTION = 0, 2
_PARALLEL_VALUES = 1 << 15
"""From how many results on threads are worth being woken."""

_SUMS_AT_ONCE = 8
"""Independent sums that hide the latency of an addition."""

_FEW_TAPS = 32
"""Up to how many terms of a sum are left to LLVM, which unrolls them."""


def schedule(sketch: Any, device: Device) -> bool:
    """Schedules every block of ``sketch``'s function; True, for it always has something to do."""
    schedule_blocks(sketch, sketch.get_child_blocks(sketch.get_sblock("root")), device)
    return True


def schedule_blocks(sketch: Any, blocks: Sequence[Any], device: Device) -> None:
    """Inlines what can be of ``blocks``, which stand in a function's root one after another; schedules the others."""
    left = [block for block in blocks[:-1] if not _inline(sketch, block)]
    for block in (*left, *blocks[-1:]):
        schedule_block(sketch, block, device)


def schedule_block(sketch: Any, block: Any, device: Device) -> None:
    """Schedules one block in its own loops; leaves scans and elementwise blocks of symbolic sizes as they are."""
    loops = sketch.get_loops(block)
    kinds = [int(var.iter_type) for var in sketch.get(block).iter_vars]
    sizes = [getattr(sketch.get(loop).extent, "value", None) for loop in loops]
    extents = [int(size) for size in sizes if size is not None]
    if not loops or len(kinds) != len(loops):
        return
    if len(extents) != len(loops):
        _symbolic(sketch, block, loops, kinds, device)
    elif all(kind == _SPATIAL for kind in kinds):
        _elementwise(sketch, block, loops, extents, device)
    elif set(kinds) == {_SPATIAL, _REDUCTION} and len(sketch.get(block).writes) == 1:
        _reduction(sketch, block, loops, kinds, extents, device)


def _inline(sketch: Any, block: Any) -> bool:
    """Inlines an elementwise block that one elementwise block reads, no value more than once; True if it was."""
    consumers = sketch.get_consumers(block)
    both = (block, *consumers)
    if len(consumers) != 1 or any(int(v.iter_type) != _SPATIAL for b in both for v in sketch.get(b).iter_vars):
        return False
    values, read = (_values(sketch, b) for b in both)
    if values is not None and read is not None and read > values:
        return False
    sketch.compute_inline(block)
    return True


def _values(sketch: Any, block: Any) -> int | None:
    """How many values a block computes; None where that is symbolic."""
    sizes = [getattr(sketch.get(loop).extent, "value", None) for loop in sketch.get_loops(block)]
    known = [int(size) for size in sizes if size is not None]
    return prod(known) if len(known) == len(sizes) else None


def _elementwise(sketch: Any, block: Any, loops: list[Any], extents: list[int], device: Device) -> None:
    together = max(_neighbours(sketch.get(block), extents), 1)
    total = prod(extents[-together:])
    inner = sketch.fuse(*loops[-together:]) if together > 1 else loops[-1]
    width = _vector(total, device)
    outer = list(loops[:-together])
    if width > 1:
        rest, lanes = sketch.split(inner, [None, width])
        sketch.vectorize(lanes)
        outer.append(rest)
    elif total <= 1:
        outer.append(inner)
    _parallel(sketch, outer, prod(extents), device)


def _reduction(sketch: Any, block: Any, loops: list[Any], kinds: list[int], extents: list[int], device: Device) -> None:
    spatial = [i for i, kind in enumerate(kinds) if kind == _SPATIAL]
    reduced = [loops[i] for i, kind in enumerate(kinds) if kind == _REDUCTION]
    last = next((i for i in reversed(spatial) if extents[i] > 1), spatial[-1])
    taps = prod(extents[i] for i, kind in enumerate(kinds) if kind == _REDUCTION)
    width = _vector(extents[last], device)
    outer = [loops[i] for i in spatial if i != last]
    along = _walks_along(sketch.get(block), last)
    if width > 1 and along:
        rest, lanes = sketch.split(loops[last], [None, width])
        sketch.reorder(*outer, rest, *reduced, lanes)
        sketch.vectorize(lanes)
        sketch.decompose_reduction(block, reduced[0])
        outer.append(rest)
    elif taps > _FEW_TAPS and not along:
        at_once = next(n for n in (_SUMS_AT_ONCE, 4, 2, 1) if extents[last] % n == 0)
        rest, lanes = sketch.split(loops[last], [None, at_once])
        sketch.reorder(*outer, rest, *reduced, lanes)
        sketch.unroll(lanes)
        sketch.decompose_reduction(block, reduced[0])
        outer.append(rest)
    elif extents[last] <= device.lanes and not along:
        # LLVM would unroll a row that short, tap by tap; as the innermost loop it becomes vectors.
        sketch.reorder(*outer, *reduced, loops[last])
        sketch.decompose_reduction(block, reduced[0])
    else:  # LLVM unrolls the taps and vectorizes what is around them, strided loads included
        outer = [loop for loop in outer if int(sketch.get(loop).extent) > 1][:1]
    _parallel(sketch, outer, prod(extents), device)


def _symbolic(sketch: Any, block: Any, loops: list[Any], kinds: list[int], device: Device) -> None:
    """Sums up along a row of results at a time, which LLVM vectorizes for any length, or a vector of a known row."""
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCTION]
    axis = max((i for i, kind in enumerate(kinds) if kind == _SPATIAL), default=-1)
    if reduced and spatial and len(sketch.get(block).writes) == 1 and _walks_along(sketch.get(block), axis):
        *outer, row = spatial
        size = getattr(sketch.get(row).extent, "value", None)
        width = 1 if size is None else _vector(int(size), device)
        if width > 1:
            rest, row = sketch.split(row, [None, width])
            outer.append(rest)
        sketch.reorder(*outer, *reduced, row)
        if width > 1:
            sketch.vectorize(row)
        sketch.decompose_reduction(block, reduced[0])


def _neighbours(block: Any, extents: list[int]) -> int:
    """How many of the last axes are neighbours in every buffer: read in step with the output, or not at all."""
    variables = [var.var for var in block.iter_vars]

    def in_step(axis: int) -> bool:
        for access in (*block.reads, *block.writes):
            region, shape = access.region, access.source.shape
            behind = len(variables) - axis
            if len(region) < behind or not _mentions(region, variables[axis]):
                if _mentions(region, variables[axis]) or any(_mentions(region, v) for v in variables[axis:]):
                    return False
                continue
            same = region[-behind].min.same_as(variables[axis])
            if not same or getattr(shape[-behind], "value", None) != extents[axis]:
                return False
        return True

    return len(list(takewhile(in_step, reversed(range(len(variables))))))


def _walks_along(block: Any, axis: int) -> bool:
    """True if neighbours along ``axis`` of the output come from neighbours in the inputs' last axes, or one value."""
    from tvm import sym

    variable = block.iter_vars[axis].var
    for access in block.reads:
        for i, bound in enumerate(access.region):
            if not _uses(bound.min, variable):
                continue
            linear = sym.detect_linear_equation(bound.min, [variable])
            if i + 1 != len(access.region) or not linear or getattr(linear[0], "value", None) != 1:
                return False
    return True


def _mentions(region: Any, variable: Any) -> bool:
    return any(_uses(bound.min, variable) for bound in region)


def _uses(expression: Any, variable: Any) -> bool:
    from tvm import tirx

    return any(free.same_as(variable) for free in tirx.analysis.undefined_vars(expression, []))


def _vector(extent: int, device: Device) -> int:
    """The widest vector that divides ``extent``; 1 where only LLVM can make something of it."""
    return next((v for v in (device.lanes, device.lanes // 2, device.lanes // 4) if v >= 4 and extent % v == 0), 1)


def _parallel(sketch: Any, loops: list[Any], values: int, device: Device) -> None:
    if device.threads > 1 and loops and values >= _PARALLEL_VALUES:
        sketch.parallel(sketch.fuse(*loops) if len(loops) > 1 else loops[0])
