"""Schedules of direct convolutions: the loop nest around a tile of accumulators that stays in registers.

``rows``: a tile is ``oc`` channels by ``th`` rows by ``tw`` columns, columns in vectors; each weight is broadcast.
``channels``: the same tile with channels in vectors; each input value is broadcast. ``order`` says what the outer loops
walk over first: "f" tiles of channels, "y" rows, whose input stays in the cache then. ``unroll``: how many of the kernel's
axes are unrolled, from the innermost on.
"""

from __future__ import annotations

from codegen.tune.device import Device
from codegen.tvm_kernels.anchor import Anchored, Loop


def schedule_rows(a: Anchored, device: Device) -> None:
    s, p = a.sketch, dict(a.schedule.params)
    n, f, y, x, rc, ry, rx = s.get_loops(a.block)
    fo, fi = s.split(f, [None, int(p["oc"])])
    yo, yi = s.split(y, [None, int(p["th"])])
    xo, xi = s.split(x, [None, int(p["tw"])])
    outer = [n, fo, yo, xo] if p["order"] == "f" else [n, yo, fo, xo]
    s.reorder(*outer, rc, ry, rx, fi, yi, xi)
    _finish(a, device, outer, [rc, ry, rx], [fi, yi], xi)
    _output(a, vector=-1, unrolled=2)


def schedule_channels(a: Anchored, device: Device) -> None:
    s, p = a.sketch, dict(a.schedule.params)
    n, y, x, f, rc, ry, rx = s.get_loops(a.block)
    fo, fi = s.split(f, [None, int(p["oc"])])
    yo, yi = s.split(y, [None, int(p["th"])])
    xo, xi = s.split(x, [None, int(p["tw"])])
    outer = [n, fo, yo, xo] if p["order"] == "f" else [n, yo, fo, xo]
    s.reorder(*outer, rc, ry, rx, yi, xi, fi)
    _finish(a, device, outer, [rc, ry, rx], [yi, xi], fi)
    _output(a, vector=-1, unrolled=2)


def _finish(a: Anchored, device: Device, outer: list[Loop], reduced: list[Loop], tile: list[Loop], lanes: Loop) -> None:
    s, p = a.sketch, dict(a.schedule.params)
    s.reverse_compute_at(a.last, outer[-1])
    if a.pad is not None:
        s.compute_at(a.pad, outer[1] if p["order"] == "y" else outer[0])
        vectorize_last(s, a.pad, device)
    s.vectorize(lanes)
    for loop in tile:
        s.unroll(loop)
    for loop in reduced[len(reduced) - int(p["unroll"]) :]:
        s.unroll(loop)
    s.decompose_reduction(a.block, reduced[0])


def vectorize_last(s, block, device: Device) -> None:
    loop = s.get_loops(block)[-1]
    s.vectorize(loop)


def _output(a: Anchored, vector: int, unrolled: int) -> None:
    s = a.sketch
    loops = s.get_loops(a.last)
    s.vectorize(loops[vector])
    for loop in loops[-1 - unrolled : -1]:
        s.unroll(loop)


def schedule_dense(a: Anchored, device: Device) -> None:
    s, p = a.sketch, dict(a.schedule.params)
    *lead, m, o, k = s.get_loops(a.block)
    mo, mi = s.split(m, [None, int(p["tw"])])
    oo, oi = s.split(o, [None, int(p["oc"])])
    outer = [*lead, oo, mo]
    s.reorder(*outer, k, mi, oi)
    s.reverse_compute_at(a.last, outer[-1])
    s.vectorize(oi)
    s.unroll(mi)
    s.decompose_reduction(a.block, k)
    _output(a, vector=-1, unrolled=1)
