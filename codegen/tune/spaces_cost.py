"""Cycles of a tile's loop nest on a core with vectors: only good for ordering schedules of one workload."""

from __future__ import annotations

from functools import lru_cache

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.spaces_plane import Pair, Plane, rounded
from passes.core.cost import StageWork

_LATENCY_CYCLES = 4.0
"""From one multiply-add to the next that adds to its result."""

_LOADS_PER_CYCLE = 2.0
_SPILL_CYCLES = 2.0
_BYTES_PER_CYCLE = ((24 << 10, 64.0), (700 << 10, 24.0), (1 << 62, 10.0))
"""What a cache of so many bytes gives: the first, the second, whatever comes behind."""


def convolution_cycles(plane: Plane, schedule: Schedule, device: Device) -> float:
    """Estimated cycles of ``schedule``, one of the templates "rows", "channels" and "depthwise"."""
    p = dict(schedule.params)
    if p.get("flat"):
        plane = plane.flattened()
    oc, th, tw = int(p["oc"]), int(p["th"]), int(p["tw"])
    out = rounded(plane.out[0], th), rounded(plane.out[1], tw)
    tiles = plane.batch * plane.groups * (rounded(plane.oc, oc) // oc) * (out[0] // th) * (out[1] // tw)
    if schedule.template == "depthwise":
        compute = tiles * _depthwise_tile_cycles(plane, th, tw, bool(p.get("phases")), device)
        memory = 0.0
    else:
        compute = tiles * _tile_cycles(plane, schedule, device)
        memory = _memory_cycles(plane, schedule)
    return max(compute, memory) + 0.25 * memory + _padding_cycles(plane, out, schedule, device)


def linear_cycles(work: StageWork, schedule: Schedule, device: Device) -> float:
    """Estimated cycles of ``schedule``, of the template "dense"."""
    oc, tw = int(schedule["oc"]), int(schedule["tw"])
    tiles = rounded(work.out_channels, oc) // oc * (rounded(work.batch, tw) // tw)
    step = _step(tw, 1, tw, oc, device)
    # Weights come from further away than the cache at hand, once per row of tiles.
    step = max(step, oc / device.lanes * 0.8) + 0.2 * abs(oc / device.lanes - 4) * (tw == 1)
    return tiles * (work.in_channels * (step + 0.5) + 2 * tw * _instructions(oc, device.lanes) + 10)


def _tile_cycles(plane: Plane, schedule: Schedule, device: Device) -> float:
    p = dict(schedule.params)
    oc, th, tw = int(p["oc"]), int(p["th"]), int(p["tw"])
    steps = plane.ic * plane.kernel[0] * plane.kernel[1]
    if schedule.template == "rows":
        step = _step(oc * th, th, oc, tw, device)
        store = 2.0 * oc * th * _instructions(tw, device.lanes)
        if plane.out[1] % tw and plane.out[1] > tw:
            store *= 4  # each value is compared with the end of the row
        if plane.strides[1] > 1 and not p.get("phases"):
            step += th * tw / 2
    else:
        step = _step(th * tw, 1, th * tw, oc, device)
        store = 0.9 * th * tw * min(oc, plane.oc)
    loop = 1.0 / (plane.kernel[1] if p["unroll"] else 1)
    return steps * (step + loop) + store + 10


def _depthwise_tile_cycles(plane: Plane, th: int, tw: int, phases: bool, device: Device) -> float:
    width = _vector_cycles(tw, device.lanes)
    taps = plane.kernel[0] * plane.kernel[1]
    rows = (th - 1) * min(plane.strides[0], plane.kernel[0]) + plane.kernel[0]
    loads = rows * plane.kernel[1] * width * 1.4  # most of them cross a line of the cache
    if plane.strides[1] > 1 and not phases:
        loads *= 8
    store = 2.0 * th * width * (4 if plane.out[1] % tw and plane.out[1] > tw else 1)
    spilled = max(0, th * _instructions(tw, device.lanes) + 4 - device.vector_registers)
    return max(th * taps * width, loads, _LATENCY_CYCLES * taps / 2) + store + _SPILL_CYCLES * spilled * taps + 8


def _step(sums: int, vectors: int, scalars: int, width: int, device: Device) -> float:
    """Cycles of one step: ``sums`` times ``width`` multiply-adds of ``vectors`` loaded vectors and ``scalars``."""
    lanes = device.lanes
    pieces = _instructions(width, lanes)
    registers = sums * pieces + vectors * pieces + 1
    multiply = sums * _vector_cycles(width, lanes)
    loads = (vectors * pieces + scalars) / _LOADS_PER_CYCLE
    spilled = max(0, registers - device.vector_registers)
    return max(multiply, loads, _LATENCY_CYCLES) + 0.1 * loads + _SPILL_CYCLES * spilled


@lru_cache(maxsize=4096)
def _instructions(width: int, lanes: int) -> int:
    """Vectors of a power of two of lanes that ``width`` values are made of."""
    return width // lanes + (width % lanes).bit_count()


@lru_cache(maxsize=4096)
def _vector_cycles(width: int, lanes: int) -> float:
    """Cycles of a multiply-add on ``width`` values: two units, of half a vector where it has 512 bits."""
    unit = lanes // 2 if lanes >= 16 else lanes
    cycles = width // lanes * lanes / unit
    rest = width % lanes
    while rest:
        piece = 1 << (rest.bit_length() - 1)
        cycles += max(1.0, piece / unit)
        rest -= piece
    return cycles / 2


def _memory_cycles(plane: Plane, schedule: Schedule) -> float:
    """Cycles of bringing input and weights to the core, as often as the outer loops walk over them."""
    p = dict(schedule.params)
    oc, th = int(p["oc"]), int(p["th"])
    high, wide = plane.needed(plane.out)
    weights = 4.0 * plane.groups * plane.oc * plane.ic * plane.kernel[0] * plane.kernel[1]
    tiles = max(1, rounded(plane.oc, oc) // oc)
    rows = max(1, rounded(plane.out[0], th) // th)
    image = 4.0 * plane.groups * plane.ic * high * wide
    if p["order"] == "f":
        once = plane.batch * tiles * image
        return once / _bandwidth(image) + plane.batch * weights / _bandwidth(weights)
    band = image / high * min(high, (th - 1) * plane.strides[0] + plane.reach[0])
    again = band / _bandwidth(band) * (tiles - 1) + band / _bandwidth(image)
    return plane.batch * rows * (again + weights / _bandwidth(weights))


def _bandwidth(size_bytes: float) -> float:
    return next(rate for limit, rate in _BYTES_PER_CYCLE if size_bytes <= limit)


def _padding_cycles(plane: Plane, out: Pair, schedule: Schedule, device: Device) -> float:
    p = dict(schedule.params)
    high, wide = plane.needed(out)
    fits = high <= plane.size[0] and wide <= plane.size[1]
    if fits and not any(plane.pads[:2]) and not p.get("phases"):
        return 0.0
    if p["order"] == "y":
        step = int(p["th"]) * plane.strides[0]
        high = high * (step + max(plane.reach[0] - plane.strides[0], 0)) // step
    elements = plane.batch * plane.groups * plane.ic * high * wide
    if p.get("flat"):
        return 1.5 * elements
    if p.get("phases"):
        return elements * (0.8 if wide > 40 else 0.4)
    return elements * 4.5 / device.lanes
