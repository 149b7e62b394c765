"""Which schedules a workload may have, from promising to not: what needs no trial comes first.

The order comes from a small model of a core: multiply-adds, loads and latency of one step of a tile's sum, what is
computed in vain where tiles do not divide the layer, and what moving values in and out of a tile costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.spaces_cost import convolution_cycles, linear_cycles
from codegen.tune.spaces_plane import Plane
from codegen.tune.workload import Workload
from passes.core.cost import StageWork

_MOST = 400
"""Schedules of a space: the model is not that wrong."""

_ROWS = (1, 2, 3, 4, 6, 8)


def templates(workload: Workload, device: Device) -> tuple[str, ...]:
    """Names of the templates that take ``workload``; () where only TVM's own legalization does."""
    if workload.dtype != "float32" or device.target.get("kind") != "llvm":
        return ()
    plane = Plane.of(workload)
    if plane is None:
        return ("dense",) if workload.work.geometry.ndim == 0 else ()
    return ("depthwise",) if plane.is_depthwise and plane.oc == 1 else ("rows", "channels")


def default(workload: Workload, device: Device) -> Schedule:
    """The schedule that needs no trial; ``Schedule("plain")`` where no template takes ``workload``."""
    return space(workload, device)[0]


def space(workload: Workload, device: Device) -> list[Schedule]:
    """All schedules worth a trial, the most promising first; never empty."""
    return list(_space(workload, device))


def adapted(schedule: Schedule, of: Workload, to: Workload, device: Device) -> Schedule | None:
    """``schedule``, good for ``of``, made to fit ``to``: the one of the same template whose tiles are most alike.

    None where the template does not take ``to``.
    """
    if schedule.template not in templates(to, device):
        return None
    wanted = dict(schedule.params)

    def distance(other: Schedule) -> float:
        return sum(_apart(wanted.get(name, 0), value) for name, value in other.params)

    same = [s for s in space(to, device) if s.template == schedule.template]
    return min(same, key=distance) if same else None


def _apart(a: int | str, b: int | str) -> float:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a - b) / max(a, b, 1)
    return 0.0 if a == b else 1.0


@lru_cache(maxsize=512)
def _space(workload: Workload, device: Device) -> tuple[Schedule, ...]:
    names, plane = templates(workload, device), Plane.of(workload)
    if not names:
        return (Schedule("plain"),)
    if plane is None:
        priced = [(linear_cycles(workload.work, s, device), s) for s in _dense(workload.work, device)]
    else:
        found = _depthwise(plane, device) if "depthwise" in names else _direct(plane, device)
        priced = [(convolution_cycles(plane, s, device), s) for s in found if _sums(s, device) <= _most_sums(device)]
    priced.sort(key=lambda pair: pair[0])
    return tuple(schedule for _, schedule in priced[:_MOST])


def _direct(plane: Plane, device: Device) -> Iterator[Schedule]:
    flat = {"flat": 1} if plane.is_pointwise and plane.size[0] > 1 else {}
    seen = plane.flattened() if flat else plane
    high, wide = seen.out
    lanes, most = device.lanes, _most_sums(device)
    orders = ("f", "y") if high > 1 else ("f",)
    unrolls = (1, 2) if plane.kernel[0] > 1 else (1,)
    phases: list[dict[str, int]] = [{"phases": 1}] if plane.strides[1] > 1 else [{}]
    widths = [w for w in (lanes // 4, lanes // 2, lanes, 2 * lanes) if w >= 4]
    for order in orders:
        for unroll in unrolls:
            base: dict[str, int | str] = {"order": order, "unroll": unroll, **flat}
            for th in sorted({min(high, t) for t in _ROWS}):
                for tw in widths:
                    for oc in _channel_tiles(plane, max(1, most * lanes // (th * max(tw, lanes)))):
                        for extra in phases:
                            yield Schedule.of("rows", oc=oc, th=th, tw=tw, **base, **extra)
                for tw in _position_tiles(wide, most // th):
                    for oc in _lane_tiles(plane, lanes, most // (th * tw)):
                        yield Schedule.of("channels", oc=oc, th=th, tw=tw, **base)


def _most_sums(device: Device) -> int:
    """Vectors of sums that a tile may have: the other registers hold what is read."""
    return device.vector_registers * 3 // 4


def _sums(schedule: Schedule, device: Device) -> int:
    """Vectors that the sums of a tile take."""
    vectors, others = ("oc", "tw") if schedule.template == "channels" else ("tw", "oc")
    return int(schedule[others] * schedule["th"] * -(-schedule[vectors] // device.lanes))


def _channel_tiles(plane: Plane, most: int) -> list[int]:
    """Tiles of at most 16 channels that waste little: what the channels give when cut into equal parts."""
    tiles = {-(-plane.oc // parts) for parts in range(1, plane.oc + 1)}
    return sorted(t for t in tiles if t <= min(most, 16) and _fits_groups(plane, t))


def _position_tiles(wide: int, most: int) -> list[int]:
    """Tiles of positions that waste little: what ``wide`` gives when cut into equal parts."""
    tiles = {-(-wide // parts) for parts in range(1, wide + 1)}
    return sorted(t for t in tiles if t <= most)


def _lane_tiles(plane: Plane, lanes: int, most: int) -> list[int]:
    """Tiles of one to ``most`` vectors of channels, or of half and a quarter of one where there are few channels."""
    whole = [lanes * n for n in (1, 2, 3, 4) if n <= most and (n == 1 or plane.oc > lanes * (n - 1))]
    parts = [lanes // n for n in (4, 2) if lanes // n >= min(4, lanes) and (plane.oc <= lanes // n or plane.groups > 1)]
    return [t for t in parts + whole if _fits_groups(plane, t)]


def _fits_groups(plane: Plane, tile: int) -> bool:
    """Channels of two groups never share a tile, nor is one filled up between them."""
    return plane.groups == 1 or plane.oc % tile == 0


def _depthwise(plane: Plane, device: Device) -> Iterator[Schedule]:
    lanes = device.lanes
    phases: tuple[dict[str, int], ...] = ({"phases": 1}, {}) if plane.strides[1] > 1 else ({},)
    for th in sorted({min(plane.out[0], t) for t in (1, 2, 3, 4, 5, 6, 8)}):
        for tw in [w for w in (lanes // 4, lanes // 2, lanes, 2 * lanes) if w >= 4]:
            for extra in phases:
                yield Schedule.of("depthwise", oc=1, th=th, tw=tw, order="f", unroll=3, **extra)


def _dense(work: StageWork, device: Device) -> Iterator[Schedule]:
    lanes, most = device.lanes, _most_sums(device)
    for vectors in (1, 2, 3, 4, 6, 8):
        if vectors > 1 and work.out_channels <= lanes * (vectors - 1):
            continue
        for tw in _position_tiles(work.batch, most // vectors):
            yield Schedule.of("dense", oc=lanes * vectors, tw=tw, unroll=0)
