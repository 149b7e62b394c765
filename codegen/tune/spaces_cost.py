"""Cycles of a tile's loop nest on a core with vectors: only good for ordering schedules of one workload."""

from __future__ import annotations

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.spaces_plane import Plane, rounded
from passes.core.cost import StageWork

_LATENCY_CYCLES = 4.0
"""From one multiply-add to the next that adds to its result."""

_LOADS_PER_CYCLE = 2.0
_SPILL_CYCLES = 2.0


def convolution_cycles(plane: Plane, schedule: Schedule, device: Device) -> float:
    """Estimated cycles of ``schedule``, one of the templates "rows" and "channels"."""
    p = dict(schedule.params)
    oc, th, tw = int(p["oc"]), int(p["th"]), int(p["tw"])
    out = rounded(plane.out[0], th), rounded(plane.out[1], tw)
    channels = plane.groups * rounded(plane.oc, oc)
    tiles = plane.batch * (channels // oc) * (out[0] // th) * (out[1] // tw)
    steps = plane.ic * plane.kernel[0] * plane.kernel[1]
    if schedule.template == "rows":
        step = _step(oc * th, th, oc, tw, device)
        store = oc * th * _instructions(tw, device.lanes)
    else:
        step = _step(th * tw, 1, th * tw, oc, device)
        store = 0.5 * th * tw * min(oc, plane.oc)
    loop = 1.0 / (plane.kernel[1] if p["unroll"] else 1)
    cycles = tiles * (steps * (step + loop) + 2 * store + 10)
    return cycles + _padding_cycles(plane, out, bool(p.get("phases")), device)


def linear_cycles(work: StageWork, schedule: Schedule, device: Device) -> float:
    """Estimated cycles of ``schedule``, of the template "dense"."""
    oc, tw = int(schedule["oc"]), int(schedule["tw"])
    tiles = rounded(work.out_channels, oc) // oc * (rounded(work.batch, tw) // tw)
    step = _step(tw, 1, tw, oc, device)
    # Weights come from further away than the cache at hand, once per row of tiles.
    step = max(step, oc / device.lanes * 0.8)
    return tiles * (work.in_channels * (step + 0.5) + 2 * tw * _instructions(oc, device.lanes) + 10)


def _step(sums: int, vectors: int, scalars: int, width: int, device: Device) -> float:
    """Cycles of one step: ``sums`` times ``width`` multiply-adds of ``vectors`` loaded vectors and ``scalars``."""
    lanes = device.lanes
    pieces = _instructions(width, lanes)
    registers = sums * pieces + vectors * pieces + 1
    multiply = sums * _vector_cycles(width, lanes)
    loads = (vectors * pieces + scalars) / _LOADS_PER_CYCLE
    spilled = max(0, registers - device.vector_registers)
    return max(multiply, loads, _LATENCY_CYCLES) + _SPILL_CYCLES * spilled


def _instructions(width: int, lanes: int) -> int:
    """Vectors of a power of two of lanes that ``width`` values are made of."""
    return width // lanes + (width % lanes).bit_count()


def _vector_cycles(width: int, lanes: int) -> float:
    """Cycles of a multiply-add on ``width`` values: two units of half of the widest vectors, of whole ones below 512 bits."""
    unit = lanes // 2 if lanes >= 16 else lanes
    cycles = width // lanes * lanes / unit
    rest = width % lanes
    while rest:
        piece = 1 << (rest.bit_length() - 1)
        cycles += max(1.0, piece / unit)
        rest -= piece
    return cycles / 2


def _padding_cycles(plane: Plane, out: tuple[int, int], phases: bool, device: Device) -> float:
    high, wide = plane.needed(out)
    fits = high <= plane.size[0] and wide <= plane.size[1]
    if fits and not any(plane.pads) and not phases:
        return 0.0
    elements = plane.batch * plane.groups * plane.ic * high * wide
    return elements * (1.0 if phases else 3.0 / device.lanes)
