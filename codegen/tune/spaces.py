"""Which schedules a workload may have, from promising to not: what needs no trial comes first.

The order comes from a small model of a core: multiply-adds, loads and latency of one step of a tile's sum, what is
computed in vain where tiles do not divide the layer, and what moving values in and out of a tile costs.
"""

from __future__ import annotations

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.spaces_cost import convolution_cycles, linear_cycles
from codegen.tune.spaces_plane import Plane
from codegen.tune.workload import Workload

_ROW_TILES = (1, 2, 3, 4, 7, 8)
_CHANNEL_TILES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)


def templates(workload: Workload, device: Device) -> tuple[str, ...]:
    """Names of the templates that take ``workload``; () where only TVM's own legalization does."""
    plane = Plane.of(workload)
    if plane is None:
        return ("dense",) if workload.work.geometry.ndim == 0 else ()
    return ("rows", "channels")


def default(workload: Workload, device: Device) -> Schedule:
    """The schedule that needs no trial."""
    return space(workload, device)[0]


def space(workload: Workload, device: Device) -> list[Schedule]:
    """All schedules worth a trial, the most promising first."""
    plane = Plane.of(workload)
    priced: list[tuple[float, Schedule]] = []
    if plane is None:
        work = workload.work
        for oc in (device.lanes // 2, device.lanes, 2 * device.lanes, 4 * device.lanes, 8 * device.lanes):
            for tw in sorted({min(work.batch, t) for t in (1, 2, 3, 4, 5, 6, 8, 10, 12)}):
                schedule = Schedule.of("dense", oc=oc, tw=tw, unroll=0)
                priced.append((linear_cycles(work, schedule, device), schedule))
    else:
        for schedule in _tiles(plane, device):
            priced.append((convolution_cycles(plane, schedule, device), schedule))
    priced.sort(key=lambda pair: pair[0])
    return [schedule for _, schedule in priced]


def adapted(schedule: Schedule, of: Workload, to: Workload, device: Device) -> Schedule | None:
    """``schedule``, good for ``of``, made to fit ``to``; None where its template does not take ``to``."""
    if schedule.template not in templates(to, device):
        return None
    same = [s for s in space(to, device) if s.template == schedule.template]
    if not same:
        return None
    wanted = dict(schedule.params)

    def distance(other: Schedule) -> float:
        mine = dict(other.params)
        return sum(_apart(wanted.get(name, value), value) for name, value in mine.items())

    return min(same, key=distance)


def _apart(a: int | str, b: int | str) -> float:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a - b) / max(a, b, 1)
    return 0.0 if a == b else 1.0


def _tiles(plane: Plane, device: Device) -> list[Schedule]:
    high, wide = plane.out
    lanes = device.lanes
    unroll = 1 if plane.kernel != (1, 1) else 0
    found = []
    rows = sorted({min(high, t) for t in _ROW_TILES})
    widths = sorted({w for w in (lanes // 4, lanes // 2, lanes, 2 * lanes, 3 * lanes, 4 * lanes) if w >= 4})
    phases = {"phases": 1} if plane.strides[1] > 1 else {}
    for oc in sorted({min(plane.oc, t) for t in _CHANNEL_TILES}):
        for th in rows:
            for tw in widths:
                found.append(Schedule.of("rows", oc=oc, th=th, tw=tw, order="f", unroll=unroll, **phases))
    for oc in sorted({lanes // 2, lanes, 2 * lanes, 3 * lanes, 4 * lanes}):
        for th in rows:
            for tw in sorted({min(wide, t) for t in (*range(1, 17), 20, 24)}):
                found.append(Schedule.of("channels", oc=oc, th=th, tw=tw, order="f", unroll=unroll))
    most = device.vector_registers - 2
    return [s for s in found if _accumulators(s, lanes) <= most]


def _accumulators(schedule: Schedule, lanes: int) -> int:
    p = schedule
    if p.template == "rows":
        return int(p["oc"] * p["th"] * -(-p["tw"] // lanes))
    return int(p["th"] * p["tw"] * -(-p["oc"] // lanes))
