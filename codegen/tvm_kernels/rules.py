"""Schedules by rules, for the functions that no template takes."""

from __future__ import annotations

from typing import Any

from codegen.tune.device import Device


def schedule(sketch: Any, device: Device) -> bool:
    """Schedules every block of ``sketch``'s function; True, for it always has something to do."""
    for block in sketch.get_child_blocks(sketch.get_sblock("root")):
        schedule_block(sketch, block, device)
    return True


def schedule_block(sketch: Any, block: Any, device: Device) -> None:
    """Fuses an elementwise block's loops and vectorizes the innermost values."""
    loops = sketch.get_loops(block)
    if not loops or any(int(v.iter_type) != 0 for v in sketch.get(block).iter_vars):
        return
    fused = sketch.fuse(*loops)
    _, inner = sketch.split(fused, [None, device.lanes])
    sketch.vectorize(inner)
