"""Convolutions as tensor expressions: what each template computes, over weights packed as it reads them.

Each has up to three stages, which schedules find by their annotations: the padded input, the anchor (the sum of
products, over sizes rounded up to whole tiles), and the output, which crops the anchor's and has the layer's axes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.tune.schedule import Schedule
from codegen.tune.spaces_plane import Plane, rounded
from codegen.tune.workload import Workload

WORKLOAD, SCHEDULE, STAGE = "rankc.workload", "rankc.schedule", "rankc.stage"
"""Annotations: the key of the workload and the JSON of the schedule on an anchor; "pad" or "out" on its neighbours."""

Tensor = Any  # tvm.te.Tensor
Attrs = Mapping[str, str]


def padded(x: Tensor, plane: Plane, out: tuple[int, int], *, phases: int = 1) -> Callable[..., Any]:
    """Reads the padded input at (image, channel, row, column), for ``out`` output rows and columns.

    ``phases`` > 1 stores column ``q`` at (q % phases, q // phases): strided reads are of neighbours then. Where nothing
    has to be padded nor stored in phases, there is no stage. ``x`` may have one spatial axis for both of ``plane``.
    """
    from tvm import te, tirx

    high, wide = plane.needed(out)
    top, left = plane.pads[:2]
    channels = plane.groups * plane.ic

    def read(a: Any, c: Any, y: Any, z: Any) -> Any:
        if len(x.shape) == 3:
            return x[a, c, z]
        if tuple(int(v) for v in x.shape[2:]) == plane.size:
            return x[a, c, y, z]
        return x[a, c, te.indexdiv(z, int(x.shape[3])), te.indexmod(z, int(x.shape[3]))]

    if phases == 1 and not (top or left) and high <= plane.size[0] and wide <= plane.size[1]:
        return read
    if plane.size[0] > 1:
        # One row too many makes the rows' bound a branch, without which LLVM does not vectorize copies of small images.
        high = max(high, plane.size[0] + top + 1)

    def value(a: Any, c: Any, y: Any, z: Any) -> Any:
        inside = tirx.all(y >= top, y < plane.size[0] + top, z >= left, z < plane.size[1] + left)
        return tirx.if_then_else(inside, read(a, c, y - top, z - left), tirx.const(0.0, x.dtype))

    if phases == 1:
        stored = te.compute((plane.batch, channels, high, wide), value, name="pad", attrs={STAGE: "pad"})
        return lambda a, c, y, z: stored[a, c, y, z]
    folded = te.compute(
        (plane.batch, channels, high, phases, rounded(wide, phases) // phases),
        lambda a, c, y, p, q: value(a, c, y, q * phases + p),
        name="pad",
        attrs={STAGE: "pad"},
    )
    return lambda a, c, y, z: folded[a, c, y, te.indexmod(z, phases), te.indexdiv(z, phases)]


def direct(x: Tensor, w: Tensor, plane: Plane, schedule: Schedule, attrs: Attrs, *, channels_last: bool) -> Tensor:
    """A convolution over weights [tile][ic][kh][kw][oc of the tile]; see :func:`packed_weight`.

    The anchor's axes are (n, f, y, x), or (n, y, x, f) where ``channels_last``, each rounded up to whole tiles; with
    ``flat`` rows and columns are one axis. A group's channels start at a tile.
    """
    from tvm import te

    p = dict(schedule.params)
    tile, width = int(p["oc"]), plane.out[1]
    whole = plane
    if p.get("flat"):
        plane = plane.flattened()
    step = rounded(plane.oc, tile)
    out = rounded(plane.out[0], int(p["th"])), rounded(plane.out[1], int(p["tw"]))
    read = padded(x, plane, out, phases=plane.strides[1] if p.get("phases") else 1)
    rc = te.reduce_axis((0, plane.ic), name="rc")
    ry, rx = (te.reduce_axis((0, plane.kernel[a]), name=("ry", "rx")[a]) for a in (0, 1))

    def product(a: Any, f: Any, y: Any, z: Any) -> Any:
        channel = rc if plane.groups == 1 else te.indexdiv(f, step) * plane.ic + rc
        row = y * plane.strides[0] + ry * plane.dilations[0]
        column = z * plane.strides[1] + rx * plane.dilations[1]
        weight = w[te.indexdiv(f, tile), rc, ry, rx, te.indexmod(f, tile)]
        return te.sum(read(a, channel, row, column) * weight, axis=[rc, ry, rx])

    total = plane.groups * step
    if channels_last:
        anchor = te.compute(
            (plane.batch, *out, total), lambda a, y, z, f: product(a, f, y, z), name="conv", attrs=dict(attrs)
        )
    else:
        anchor = te.compute((plane.batch, total, *out), product, name="conv", attrs=dict(attrs))

    def at(a: Any, f: Any, y: Any, z: Any) -> Any:
        if step != plane.oc and plane.groups > 1:
            f = te.indexdiv(f, plane.oc) * step + te.indexmod(f, plane.oc)
        if p.get("flat"):
            y, z = 0, y * width + z
        return anchor[a, y, z, f] if channels_last else anchor[a, f, y, z]

    return shuffled(output(at, whole, len(x.shape) == 3), whole, attrs)


def output(at: Callable[..., Any], plane: Plane, flat: bool) -> Tensor:
    """The layer's output, (n, f, x) where ``flat`` and (n, f, y, x) otherwise, from ``at(n, f, y, x)``."""
    from tvm import te

    n, channels, (high, wide) = plane.batch, plane.groups * plane.oc, plane.out
    if flat:
        return te.compute((n, channels, wide), lambda a, f, z: at(a, f, 0, z), name="out", attrs={STAGE: "out"})
    return te.compute((n, channels, high, wide), at, name="out", attrs={STAGE: "out"})


def shuffled(phases: Tensor, plane: Plane, attrs: Attrs) -> Tensor:
    """The output of a transposed convolution from its phases, which stand in the channels; others are as they are."""
    from tvm import te

    high, wide = plane.shuffle
    if plane.shuffle == (1, 1):
        return phases
    work = Workload.parse(attrs[WORKLOAD]).work
    own = plane.oc // (high * wide)

    def value(a: Any, f: Any, *at: Any) -> Any:
        *row, column = at
        phase = te.indexmod(column, wide)
        if row:
            phase = te.indexmod(row[0], high) * wide + phase
        channel = (te.indexdiv(f, own) * (high * wide) + phase) * own + te.indexmod(f, own)
        return phases[(a, channel, *(te.indexdiv(y, high) for y in row), te.indexdiv(column, wide))]

    return te.compute((plane.batch, work.out_channels, *work.output_spatial), value, name="shuffle")


def phase_weight(weight: NDArray[Any], workload: Workload) -> NDArray[Any]:
    """(O, I/groups, *kernel) of a transposed convolution as (groups x phases x O/groups, I/groups, window)."""
    plane, geometry = Plane.of(workload), workload.work.geometry
    assert plane is not None
    n = geometry.ndim
    kernel, pads = ((1, *v)[-2:] for v in (geometry.kernel, (0,) * (2 - n) + geometry.pads[:n]))
    grouped = weight.reshape(geometry.groups, -1, plane.ic, *kernel)
    phases = np.zeros((geometry.groups, *plane.shuffle, grouped.shape[1], plane.ic, *plane.kernel), weight.dtype)
    for phase in np.ndindex(*plane.shuffle):
        for tap in np.ndindex(*kernel):
            # input q + t meets the tap with r + pad = tap + t * stride; see phase_window
            steps = [phase[a] + pads[a] - tap[a] for a in (0, 1)]
            if any(step % s for step, s in zip(steps, plane.shuffle, strict=True)):
                continue
            y, x = (steps[a] // plane.shuffle[a] + plane.pads[a] for a in (0, 1))
            phases[:, phase[0], phase[1], :, :, y, x] = grouped[..., tap[0], tap[1]]
    return phases.reshape(-1, plane.ic, *plane.kernel)


def packed_weight(weight: NDArray[Any], plane: Plane, tile: int) -> NDArray[Any]:
    """(groups * oc, ic, kh, kw) as [tile][ic][kh][kw][oc of the tile]; a group's last tile is filled with zeros."""
    step = rounded(plane.oc, tile)
    grouped = weight.reshape(plane.groups, plane.oc, plane.ic, *plane.kernel)
    filled = np.zeros((plane.groups, step, *grouped.shape[2:]), weight.dtype)
    filled[:, : plane.oc] = grouped
    tiles = filled.reshape(-1, tile, plane.ic, *plane.kernel)
    return np.ascontiguousarray(np.moveaxis(tiles, 1, -1))


def packed_shape(plane: Plane, tile: int) -> tuple[int, ...]:
    """The shape that :func:`packed_weight` gives."""
    return plane.groups * rounded(plane.oc, tile) // tile, plane.ic, *plane.kernel, tile


def dense(x: Tensor, w: Tensor, schedule: Schedule, attrs: Attrs) -> Tensor:
    """(..., M, K) times weights [tile][K][oc of the tile]: (..., M, O); the anchor's last two axes are whole tiles."""
    from tvm import te, tirx

    p = dict(schedule.params)
    *lead, m, k = (int(v) for v in x.shape)
    tiles, _, tile = (int(v) for v in w.shape)
    rows = rounded(m, int(p["tw"]))
    rk = te.reduce_axis((0, k), name="rk")

    def product(*at: Any) -> Any:
        *outer, i, j = at
        row = i if rows == m else tirx.min(i, m - 1)  # rows behind the last one repeat it, and are cropped
        return te.sum(x[(*outer, row, rk)] * w[te.indexdiv(j, tile), rk, te.indexmod(j, tile)], axis=rk)

    anchor = te.compute((*lead, rows, tiles * tile), product, name="dense", attrs=dict(attrs))
    channels = Workload.parse(attrs[WORKLOAD]).work.out_channels
    return te.compute((*lead, m, channels), lambda *at: anchor[at], name="out", attrs={STAGE: "out"})


def packed_matrix(weight: NDArray[Any], tile: int) -> NDArray[Any]:
    """(out, in) as [tile][in][out of the tile], the last tile filled with zeros."""
    out, k = weight.shape
    filled = np.zeros((rounded(out, tile), k), weight.dtype)
    filled[:out] = weight
    return np.ascontiguousarray(np.moveaxis(filled.reshape(-1, tile, k), 1, -1))


def workload_attrs(workload: Workload, schedule: Schedule) -> dict[str, str]:
    """The annotations of an anchor."""
    return {WORKLOAD: workload.key, SCHEDULE: json.dumps(schedule.to_json(), sort_keys=True)}


def pack(weight: NDArray[Any], workload: Workload, schedule: Schedule) -> NDArray[Any]:
    """``weight`` (O, I/groups, *kernel), or (O, I) of a linear layer, as ``schedule`` reads it."""
    plane = Plane.of(workload)
    if plane is None:
        return packed_matrix(weight, int(schedule["oc"]))
    if workload.work.geometry.transposed:
        weight = phase_weight(weight, workload)
    return packed_weight(weight, plane, int(schedule["oc"]))


CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor, Plane, Schedule, Attrs], Tensor]] = {
    "rows": partial(direct, channels_last=False),
    "channels": partial(direct, channels_last=True),
    "depthwise": partial(direct, channels_last=False),
    "metaschedule": partial(direct, channels_last=False),
}
"""The expression of each template that takes convolutions."""
