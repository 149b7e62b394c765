"""Cuts an integer network into what the accelerator runs and what stays on the host, each part as large as can be.

A part's stage is the number of times the way to it changes sides: everything on the accelerator with the same stage
forms one segment. So a network that the accelerator runs whole is one segment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from codegen.quantized.graph import QHost, QOperation, QuantizedGraph
from codegen.quantized.operands import reads, writes


@dataclass(frozen=True, eq=False)
class Segment:
    """A part that the accelerator runs: a network of its own, from ``graph.inputs`` to ``graph.outputs``, all bytes."""

    graph: QuantizedGraph


@dataclass(frozen=True, eq=False)
class Cut:
    """``parts`` in an order in which they can run."""

    graph: QuantizedGraph
    parts: tuple[Segment | QHost, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(part for part in self.parts if isinstance(part, Segment))


def cut(graph: QuantizedGraph) -> Cut:
    """Segments and host parts of ``graph``."""
    # Even stages are the accelerator's, odd ones the host's.
    stage_of: dict[str, int] = dict.fromkeys((*graph.inputs, *graph.constants), 0)
    stages: dict[int, list[QOperation]] = {}
    for operation in graph.operations:
        stage = max((stage_of[name] for name in reads(operation)), default=0)
        if stage % 2 != isinstance(operation, QHost):
            stage += 1
        stages.setdefault(stage, []).append(operation)
        stage_of.update(dict.fromkeys(writes(operation), stage))
    readers = Counter(name for operation in graph.operations for name in reads(operation))
    parts: list[Segment | QHost] = []
    for stage, operations in sorted(stages.items()):
        if stage % 2:
            parts.extend(operation for operation in operations if isinstance(operation, QHost))
        else:
            parts.append(Segment(_part(graph, operations, readers)))
    return Cut(graph, tuple(parts))


def _part(graph: QuantizedGraph, operations: list[QOperation], readers: Counter[str]) -> QuantizedGraph:
    made = [name for operation in operations for name in writes(operation)]
    read = Counter(name for operation in operations for name in reads(operation))
    inputs = tuple(name for name in read if name not in set(made) and name not in graph.constants)
    # Read elsewhere, or by nobody: then it is an output of the network (which may be read here as well).
    outputs = tuple(name for name in made if name in graph.outputs or readers[name] > read[name])
    constants = {name: value for name, value in graph.constants.items() if name in read}
    names = {*inputs, *made, *constants}
    return QuantizedGraph(
        tensors={name: tensor for name, tensor in graph.tensors.items() if name in names},
        operations=tuple(operations),
        inputs=inputs,
        outputs=outputs,
        float_inputs=(False,) * len(inputs),
        float_outputs=(False,) * len(outputs),
        input_names=inputs,
        output_names=outputs,
        constants=constants,
    )
