"""Schedules of direct convolutions: the loop nest around a tile of accumulators that stays in registers.

``rows``: a tile is ``oc`` channels by ``th`` rows by ``tw`` columns, columns in vectors; each weight is broadcast.
``channels``: the same tile with channels in vectors; each input value is broadcast. ``order``: what the outer loops
walk over first, "f" tiles of channels, "y" rows, whose input stays in the cache then. ``unroll``: how many of the
kernel's axes are unrolled, from the innermost on.
"""

from __future__ import annotations

from math import prod

from codegen.tune.device import Device
from codegen.tvm_kernels.anchor import Anchored, Loop, Sketch

_PARALLEL_MACS = 1_000_000
"""From how many multiply-adds on, some 20 us, threads are worth being woken."""


def schedule_rows(a: Anchored, device: Device) -> None:
    s, p = a.sketch, dict(a.schedule.params)
    n, f, y, x, rc, ry, rx = s.get_loops(a.block)
    fo, fi = s.split(f, [None, int(p["oc"])])
    yo, yi = s.split(y, [None, int(p["th"])])
    xo, xi = s.split(x, [None, int(p["tw"])])
    outer = [n, fo, yo, xo] if p["order"] == "f" else [n, yo, fo, xo]
    s.reorder(*outer, rc, ry, rx, fi, yi, xi)
    _finish(a, device, outer, [rc, ry, rx], [fi, yi], xi, pad_at=yo if p["order"] == "y" else n)


def schedule_channels(a: Anchored, device: Device) -> None:
    s, p = a.sketch, dict(a.schedule.params)
    n, y, x, f, rc, ry, rx = s.get_loops(a.block)
    fo, fi = s.split(f, [None, int(p["oc"])])
    yo, yi = s.split(y, [None, int(p["th"])])
    xo, xi = s.split(x, [None, int(p["tw"])])
    outer = [n, fo, yo, xo] if p["order"] == "f" else [n, yo, fo, xo]
    s.reorder(*outer, rc, ry, rx, yi, xi, fi)
    _finish(a, device, outer, [rc, ry, rx], [yi, xi], fi, pad_at=yo if p["order"] == "y" else n)


def schedule_depthwise(a: Anchored, device: Device) -> None:
    """One channel after the other, its padded image in the nearest cache; all taps are unrolled."""
    s, p = a.sketch, dict(a.schedule.params)
    n, f, y, x, rc, ry, rx = s.get_loops(a.block)
    yo, yi = s.split(y, [None, int(p["th"])])
    xo, xi = s.split(x, [None, int(p["tw"])])
    outer = [n, f, yo, xo]
    s.reorder(*outer, rc, ry, rx, yi, xi)
    _finish(a, device, outer, [rc, ry, rx], [yi], xi, pad_at=f)


def schedule_dense(a: Anchored, device: Device) -> None:
    s, p = a.sketch, dict(a.schedule.params)
    *lead, m, o, k = s.get_loops(a.block)
    mo, mi = s.split(m, [None, int(p["tw"])])
    oo, oi = s.split(o, [None, int(p["oc"])])
    outer = [*lead, oo, mo]
    s.reorder(*outer, k, mi, oi)
    _finish(a, device, outer, [k], [mi], oi, pad_at=oo)


def _finish(
    a: Anchored,
    device: Device,
    outer: list[Loop],
    reduced: list[Loop],
    tile: list[Loop],
    inner: Loop,
    *,
    pad_at: Loop,
) -> None:
    """Brings the output and the padded input into the loops, then unrolls and vectorizes the tile.

    ``outer``, ``reduced``, ``tile`` and ``inner``: the anchor's loops from the outermost on.
    """
    s, p = a.sketch, dict(a.schedule.params)
    if p.get("flat"):
        width = int(s.get(s.get_loops(a.last)[-1]).extent)
        s.transform_block_layout(a.last, lambda n, f, y, x: (n, f, y * width + x))
    s.reverse_compute_at(a.last, outer[-1])
    if a.pad is not None and int(s.get(pad_at).extent) > 1:
        s.compute_at(a.pad, pad_at)
    # Small tiles go to the stack by themselves; this takes the larger ones there, where LLVM finds them registers.
    s.set_scope(a.block, 0, "local")
    for loop in (*tile, *_vectorized(s, inner, device)):
        s.unroll(loop)
    for loop in reduced[len(reduced) - int(p["unroll"]) :]:
        s.unroll(loop)
    if device.threads > 1 and a.workload.work.macs >= _PARALLEL_MACS:
        outer = _parallel(a, outer, pad_at, device.threads)  # TVM wants the sum in one piece for this
    s.decompose_reduction(a.block, reduced[0])
    _vectorize_output(a, device, len(outer))


def _parallel(a: Anchored, outer: list[Loop], pad_at: Loop, threads: int) -> list[Loop]:
    """Shares the outer loops among threads, all but the innermost where the others suffice.

    Returns the outer loops that there are then.
    """
    s = a.sketch
    inside = a.pad is not None and int(s.get(pad_at).extent) > 1
    rows = prod(int(s.get(loop).extent) for loop in outer[:-1])
    shared = outer if rows < 2 * threads else outer[:-1]
    if inside:
        shared = outer[: outer.index(pad_at) + 1]
    together = s.fuse(*shared) if len(shared) > 1 else shared[0]
    s.parallel(together)
    if a.pad is not None and not inside:
        loops = s.get_loops(a.pad)
        s.parallel(s.fuse(*loops[:2]))
    return [together, *outer[len(shared) :]]


def _vectorized(s: Sketch, loop: Loop, device: Device) -> list[Loop]:
    """Vectorizes ``loop``; where it is longer than a vector, returns the loop over whole ones around it.

    LLVM takes vectors apart that are longer than a register, badly where their length is no power of two.
    """
    extent = int(s.get(loop).extent)
    if extent > device.lanes and extent % device.lanes == 0:
        around, loop = s.split(loop, [None, device.lanes])
        s.vectorize(loop)
        return [around]
    if extent <= device.lanes:
        s.vectorize(loop)
        return []
    return [loop]


def _vectorize_output(a: Anchored, device: Device, outside: int) -> None:
    """The output's loops inside the tile: the innermost in vectors, the others unrolled; loops of one trip are gone."""
    s = a.sketch
    inside = s.get_loops(a.last)[outside:]
    if not inside:
        return
    extent, whole = int(s.get(inside[-1]).extent), device.lanes
    if extent > whole and extent % whole:
        parts = s.loop_partition(inside[-1], [extent // whole * whole, None])
        for part in parts:
            for loop in _vectorized(s, part, device):
                s.unroll(loop)
        inside = inside[:-1]
    else:
        inside[-1:] = _vectorized(s, inside[-1], device)
    for loop in inside:
        s.unroll(loop)
