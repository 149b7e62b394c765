"""A fused function around its anchor: what stands before it, what behind, and how both come into its loops."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from codegen.tvm_kernels.tensors import SCHEDULE, STAGE, WORKLOAD

Loop = Any  # a loop, a block and a schedule of tvm.s_tir
Block = Any
Sketch = Any


class DoesNotFit(Exception):
    """A template meets a function that it was not made for; a simpler schedule takes over."""


@dataclass(frozen=True)
class Anchored:
    """``sketch``: the schedule under work. ``pad`` and ``before`` feed the anchor, ``last`` computes the output.

    What stood between the anchor and ``last`` is inlined. ``rest``: blocks behind ``last`` that walk over other axes.
    """

    sketch: Sketch
    workload: Workload
    schedule: Schedule
    block: Block
    pad: Block | None
    before: tuple[Block, ...]
    last: Block
    rest: tuple[Block, ...]

    @classmethod
    def of(cls, sketch: Sketch, *, alone: bool = False) -> Anchored | None:
        """Finds the anchor of ``sketch``'s function and inlines around it; None where there is none.

        ``alone``: what stands behind the anchor is left where it is.
        """
        blocks = sketch.get_child_blocks(sketch.get_sblock("root"))
        notes = [sketch.get(block).annotations for block in blocks]
        found = [i for i, note in enumerate(notes) if WORKLOAD in note]
        if not found:
            return None
        if len(found) > 1:
            raise DoesNotFit(f"{len(found)} anchors in one function")
        index = found[0]
        stages = {str(note[STAGE]): i for i, note in enumerate(notes) if STAGE in note}
        pad, out = stages.get("pad"), stages["out"]
        behind = [] if alone else _in_step(sketch, blocks, out)
        before = [i for i in range(index) if i != pad]
        readers = [blocks[i] for i in (pad, index) if i is not None]
        aside = [i for i in before if behind and _feeds_none_of(sketch, blocks[i], readers)]
        for i in (*aside, *(out, *behind)[:-1]):
            sketch.compute_inline(blocks[i])
        last = blocks[behind[-1] if behind else out]
        return cls(
            sketch,
            Workload.parse(str(notes[index][WORKLOAD])),
            Schedule.from_json(json.loads(str(notes[index][SCHEDULE]))),
            blocks[index],
            None if pad is None else blocks[pad],
            tuple(blocks[i] for i in before if i not in aside),
            last,
            tuple(blocks[i] for i in range(out + 1, len(blocks)) if i not in behind),
        )


def _in_step(sketch: Sketch, blocks: list[Block], out: int) -> list[int]:
    """Indices of the elementwise blocks behind ``out`` that walk over its axes, up to the only one that ends them."""
    if out + 1 == len(blocks):
        return []
    shape = [int(sketch.get(loop).extent) for loop in sketch.get_loops(blocks[out])]
    behind = list(range(out + 1, len(blocks)))
    for i in behind:
        block = sketch.get(blocks[i])
        extents = [int(sketch.get(loop).extent) for loop in sketch.get_loops(blocks[i])]
        plain = all(int(v.iter_type) == 0 for v in block.iter_vars) and len(block.writes) == 1
        if extents != shape or not plain:
            return []
    ends = sketch.get_output_blocks(sketch.get_sblock("root"))
    return behind if len(ends) == 1 else []


def _feeds_none_of(sketch: Sketch, block: Block, readers: list[Block]) -> bool:
    """True for an elementwise block that only what stands behind the anchor reads, an operand of the epilogue."""
    names = {str(sketch.get(reader).name_hint) for reader in readers}
    consumers = {str(sketch.get(consumer).name_hint) for consumer in sketch.get_consumers(block)}
    return not names & consumers and all(int(v.iter_type) == 0 for v in sketch.get(block).iter_vars)
