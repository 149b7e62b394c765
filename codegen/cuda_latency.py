"""The prices of a GPU that is not at hand: its roofline, and what starting a kernel costs.

A kernel takes at least the time of its arithmetic at the data sheet's peak, and at least that of its bytes at the
memory's (Williams et al. 2009, Roofline). Small kernels are bound by neither but by their launch, so a chain of
small stages is priced as the loss that it is. Kernels of default schedules take longer; every price is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codegen.asic_ops import ACTIVATIONS, FREE, elements
from codegen.cuda_gpus import Gpu
from passes.core.cost import Cost, OpWork, StageWork, least_cost

LAUNCH_S = 2.5e-6
"""From one kernel to the next in a stream: between 2 and 3 microseconds on the GPUs of the table."""

_FUSED = ACTIVATIONS | {"BatchNormalization", "Add", "Sub", "Mul", "Div"}
"""Computed in the kernel whose result they take."""


class CudaRoofline:
    """:class:`passes.core.cost.LatencyModel` of a GPU; latency in seconds, energy unknown."""

    unit = "s"
    margin = 0.05
    granularity = 8

    def __init__(self, gpu: Gpu, weight_file_bytes: int = 4) -> None:
        self.gpu = gpu
        self._weight_file_bytes = weight_file_bytes

    def chains(self, works: Sequence[tuple[StageWork, ...]]) -> list[Cost]:
        """Cost of each chain, a kernel for each stage."""
        return [sum((self._stage(stage) for stage in work), Cost(unit=self.unit)) for work in works]

    def network(self, ops: Sequence[OpWork]) -> Cost:
        """The sum over the operators; what is computed in another one's kernel adds its further operands alone."""
        return sum(self.layers(ops), Cost(unit=self.unit))

    def layers(self, ops: Sequence[OpWork]) -> list[Cost]:
        """The cost of each operator, in the order of ``ops``."""
        made = {name for op in ops if op.op not in FREE for name in op.outputs}
        return [
            (self._other(op, made) if op.stage is None else self._stage(op.stage)).with_weights(
                op.weight_params, op.weight_bytes
            )
            for op in ops
        ]

    def floor(self, ops: Sequence[OpWork], options: Mapping[str, Sequence[tuple[StageWork, ...]]]) -> Cost:
        """The sum of the minima, since prices add up."""
        total = Cost(unit=self.unit)
        for op, cost in zip(ops, self.layers(ops), strict=True):
            total += least_cost(self.chains(options[op.name]) if op.name in options else [cost])
        return total

    def _stage(self, stage: StageWork) -> Cost:
        params = stage.weights + (stage.out_channels if stage.bias else 0)
        positions = (stage.spatial, stage.output_spatial if stage.geometry.ndim else ())
        shapes = [
            (stage.batch, channels, *sizes)
            for channels, sizes in zip((stage.in_channels, stage.out_channels), positions, strict=True)
        ]
        moved = 4 * (elements(tuple(shapes)) + params)
        return Cost(
            latency=self._seconds(2 * stage.macs, moved),
            unit=self.unit,
            dram_bytes=moved,
            macs=stage.macs,
            params=params,
            size_bytes=params * self._weight_file_bytes,
        )

    def _other(self, op: OpWork, made: set[str]) -> Cost:
        """An operator that is no layer; ``made``: tensors that kernels of this network write."""
        if op.op in FREE:
            return Cost(unit=self.unit)
        read, written = (4 * elements(shapes) for shapes in (op.input_shapes, op.output_shapes))
        if op.op in _FUSED and any(name in made for name in op.inputs):
            further = max(read - 4 * elements(op.input_shapes[:1]), 0)
            return Cost(latency=further / self.gpu.bytes_per_s, unit=self.unit, dram_bytes=further)
        macs = op.weight_params
        if op.op == "MatMul" and len(op.input_shapes) == 2:
            macs = elements(op.output_shapes) * op.input_shapes[0][-1]
        moved = read + written + 4 * op.weight_params
        return Cost(latency=self._seconds(2 * macs, moved), unit=self.unit, dram_bytes=moved, macs=macs)

    def _seconds(self, flops: float, moved_bytes: float) -> float:
        return LAUNCH_S + max(flops / self.gpu.flops, moved_bytes / self.gpu.bytes_per_s)
