"""The prices of a tuned target: times of kernels that were measured on the device, and predictions for the others.

A layer costs the time of its kernel, tuned by itself, and what a call from the network's program adds. What stands
between the layers is estimated from the bytes it moves; what a whole binary takes beyond the list is measured, and
taken care of by :class:`codegen.plan_search.PlanSearch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from codegen.asic_ops import ACTIVATIONS, FREE, elements
from codegen.events import Events
from codegen.tune.device import Device
from codegen.tune.predictor import Predictor
from codegen.tune.workload import Workload
from passes.core.cost import Cost, Kind, OpWork, StageWork, least_cost

CALL_S = 1e-7
"""What a kernel costs in a network beyond its own time: its call by the program, and operands that come from afar."""

_BYTES_PER_S = 100e9
_FLOPS_PER_LANE = 3e9
_FUSED = ACTIVATIONS | {"BatchNormalization", "Add", "Sub", "Mul", "Div", "Identity", "Dropout", "Cast"}
"""Computed in the loops of the kernel whose result they take."""


class Trials(Protocol):
    """The kernels that were measured on the device, and more of them on demand."""

    def best_s(self, workload: Workload) -> float | None:
        """Seconds of the fastest trial; None where there is none that worked."""
        ...

    def measured(self) -> Mapping[Workload, float]:
        """Seconds of the fastest trial of every workload that has one."""
        ...

    def wanting(self, workloads: Sequence[Workload]) -> list[Workload]:
        """Those that more trials may still be made of."""
        ...

    def make(self, workloads: Sequence[Workload], events: Events, out_of_time: Callable[[], bool]) -> int:
        """Tries schedules of each of the workloads; returns how many trials were made, broken ones included.

        ``out_of_time`` is asked after each.
        """
        ...


class CpuLatency:
    """:class:`passes.core.cost.LatencyModel` of a ``device``; latency in seconds, energy unknown.

    Prices move with the trials: what is asked again after :meth:`measure` may cost something else.
    """

    unit = "s"
    granularity = 2

    def __init__(self, device: Device, trials: Trials | None, margin: float = 0.02, weight_file_bytes: int = 4) -> None:
        self.device, self.margin = device, margin
        self._trials = trials
        self._weight_file_bytes = weight_file_bytes
        self._predictor: Predictor | None = None
        self._prices: dict[StageWork, tuple[float, float, Kind]] = {}

    def chains(self, works: Sequence[tuple[StageWork, ...]]) -> list[Cost]:
        """Cost of each chain: measured where each of its stages was, estimated otherwise."""
        self._price([stage for work in works for stage in work])
        return [sum((self._stage_cost(stage) for stage in work), Cost(unit="s", kind=Kind.MEASURED)) for work in works]

    def network(self, ops: Sequence[OpWork]) -> Cost:
        """The sum over the operators; estimated, unless all are layers that were measured."""
        return sum(self.layers(ops), Cost(unit="s", kind=Kind.MEASURED))

    def layers(self, ops: Sequence[OpWork]) -> list[Cost]:
        """The cost of each operator, in the order of ``ops``; nothing where it is computed in another one's loops."""
        self._price([op.stage for op in ops if op.stage is not None])
        made = {name for op in ops if op.op not in FREE for name in op.outputs}
        rows = []
        for op in ops:
            cost = self._other_cost(op, made) if op.stage is None else self._stage_cost(op.stage)
            rows.append(cost.with_weights(op.weight_params, op.weight_bytes))
        return rows

    def floor(self, ops: Sequence[OpWork], options: Mapping[str, Sequence[tuple[StageWork, ...]]]) -> Cost:
        """What no plan gets below at today's prices: the sum of the minima, since prices add up."""
        total = Cost(unit="s", kind=Kind.MEASURED)
        for op, cost in zip(ops, self.layers(ops), strict=True):
            total += least_cost(self.chains(options[op.name]) if op.name in options else [cost])
        return total

    def outline(self) -> CpuLatency:
        """The prices of an empty database: what is worth a look must not depend on what was tried before."""
        return CpuLatency(self.device, None, self.margin, self._weight_file_bytes)

    def spread(self, works: Sequence[tuple[StageWork, ...]]) -> list[float]:
        """The standard deviation of each chain's price in seconds; 0 for what was measured."""
        self._price([stage for work in works for stage in work])
        return [float(np.sqrt(sum(self._spread_s(stage) ** 2 for stage in work))) for work in works]

    def wanting(self, works: Sequence[StageWork]) -> list[StageWork]:
        """The stages that :meth:`measure` would make trials of; none without a device at hand."""
        if self._trials is None:
            return []
        return [workload.work for workload in self._trials.wanting(_workloads(works))]

    def measure(
        self, works: Sequence[StageWork], events: Events, out_of_time: Callable[[], bool] = lambda: False
    ) -> bool:
        """Makes trials of those stages that want them; True where any was made: prices may have moved then."""
        if self._trials is None:
            return False
        wanting = self._trials.wanting(_workloads(works))
        made = self._trials.make(wanting, events, out_of_time) if wanting else 0
        if made:
            self._learn()
        return made > 0

    def _learn(self) -> Predictor:
        measured = {} if self._trials is None else self._trials.measured()
        self._predictor = Predictor.of(self.device, [w.work for w in measured], list(measured.values()))
        self._prices.clear()
        return self._predictor

    def _price(self, stages: Sequence[StageWork]) -> None:
        predictor = self._learn() if self._predictor is None else self._predictor
        new = list(dict.fromkeys(key for stage in stages if (key := _key(stage)) not in self._prices))
        guessed = []
        for stage in new:
            best = None if self._trials is None else self._trials.best_s(Workload(stage))
            if best is None:
                guessed.append(stage)
            else:
                self._prices[stage] = (best, 0.0, Kind.MEASURED)
        for stage, seconds, deviation in zip(guessed, *predictor.predict(guessed), strict=True):
            self._prices[stage] = (float(seconds), float(deviation), Kind.ESTIMATED)

    def _stage_cost(self, stage: StageWork) -> Cost:
        seconds, _, kind = self._prices[_key(stage)]
        params = stage.weights + (stage.out_channels if stage.bias else 0)
        return Cost(
            latency=seconds + CALL_S,
            unit="s",
            macs=stage.macs,
            params=params,
            size_bytes=params * self._weight_file_bytes,
            kind=kind,
        )

    def _spread_s(self, stage: StageWork) -> float:
        seconds, deviation, _ = self._prices[_key(stage)]
        return seconds * deviation

    def _other_cost(self, op: OpWork, made: set[str]) -> Cost:
        """An operator that is no layer, by the bytes that it touches and the products of two activations that it forms.

        ``made``: tensors that kernels of this network write.
        """
        if op.op in FREE:
            return Cost(unit="s")
        read, written = (4 * elements(shapes) for shapes in (op.input_shapes, op.output_shapes))
        flops = 2 * op.weight_params
        if op.op == "MatMul" and len(op.input_shapes) == 2:
            flops = 2 * elements(op.output_shapes) * op.input_shapes[0][-1]
        in_loops = op.op in _FUSED and any(name in made for name in op.inputs)
        if in_loops:
            first = 4 * elements(op.input_shapes[:1])
            return Cost(latency=max(read - first, 0) / _BYTES_PER_S, unit="s")
        seconds = CALL_S + (read + written) / _BYTES_PER_S + flops / (_FLOPS_PER_LANE * self.device.lanes)
        return Cost(latency=seconds, unit="s", macs=flops // 2)


def _key(stage: StageWork) -> StageWork:
    return stage if stage.bias else replace(stage, bias=True)


def _workloads(works: Sequence[StageWork]) -> list[Workload]:
    return [Workload(stage) for stage in dict.fromkeys(map(_key, works))]
