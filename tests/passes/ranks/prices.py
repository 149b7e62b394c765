"""A price list with stairs: a target that works in tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod

from passes.core.cost import Cost, Kind, OpWork, StageWork, additive_floor


@dataclass
class TiledPrices:
    """Channels of input and output are worked on in tiles; each stage costs ``start`` cycles on top."""

    tile: int = 4
    start: int = 10
    margin: float = 0.0
    granularity: int = 1
    unit: str = "cycles"
    asked: list[int] = field(default_factory=list)

    def stage_cycles(self, work: StageWork) -> int:
        groups = work.geometry.groups
        tiles = ceil(work.in_channels / groups / self.tile) * ceil(work.out_channels / groups / self.tile)
        return self.start + work.batch * prod(work.output_spatial) * prod(work.geometry.kernel) * groups * tiles

    def chains(self, works: Sequence[tuple[StageWork, ...]]) -> list[Cost]:
        self.asked.append(len(works))
        return [
            Cost(float(sum(self.stage_cycles(w) for w in chain)), energy_pj=float(len(chain)), kind=Kind.SIMULATED)
            for chain in works
        ]

    def network(self, ops: Sequence[OpWork]) -> Cost:
        return sum((self.chains([(op.stage,)])[0] for op in ops if op.stage is not None), Cost(kind=Kind.MEASURED))

    def floor(self, ops: Sequence[OpWork], options: Mapping[str, Sequence[tuple[StageWork, ...]]]) -> Cost:
        return additive_floor(self, ops, options)
