"""What runs together: a chain of layers with all that is applied on its way out, or a single operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codegen.asic_latency import NetworkPlan
from codegen.asic_network import Role
from codegen.quantized.graph import QConv, QOperation, QSum, QTable, QuantizedGraph
from codegen.quantized.operands import reads, writes


@dataclass(frozen=True)
class WayOut:
    """What is applied to a layer's result before it leaves: ``operations`` of the network, by number.

    ``own``: the tensor that the layer brings into ``sum``; ``table`` is applied to it before, ``sum_table`` to the sum.
    ``tensor`` is what leaves.
    """

    operations: tuple[int, ...]
    tensor: str
    own: str
    table: bytes | None = None
    sum: QSum | None = None
    sum_table: bytes | None = None

    @property
    def residual(self) -> str | None:
        """The other tensor of the sum."""
        if self.sum is None:
            return None
        return self.sum.b if self.sum.a == self.own else self.sum.a


def way_out(graph: QuantizedGraph, plan: NetworkPlan, stage: int) -> WayOut:
    """Follows a layer's result through the tables and the sum that the plan applies on its way out."""
    operation = graph.operations[stage]
    assert isinstance(operation, QConv)
    following = {name: i for i, op in enumerate(graph.operations) for name in reads(op)}
    tensor = own = operation.output
    done: list[int] = []
    tables: list[bytes | None] = [None, None]
    total: QSum | None = None
    while tensor in following:
        i = following[tensor]
        op = graph.operations[i]
        if i == plan.sums.get(stage):
            assert isinstance(op, QSum)
            total, own = op, tensor
        elif plan.roles[i] is Role.EPILOGUE and isinstance(op, QTable):
            at = 0 if total is None else 1
            before = tables[at]
            tables[at] = op.table if before is None else bytes(op.table[byte] for byte in before)
        else:
            break
        done.append(i)
        tensor = writes(op)[0]
    return WayOut(tuple(done), tensor, own, tables[0], total, tables[1])


@dataclass(frozen=True)
class Unit:
    """``operations`` by number, the first one the unit's own; the tensors that come in and those that are made."""

    operations: tuple[int, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]


def units(graph: QuantizedGraph, plan: NetworkPlan, ways_out: dict[int, WayOut]) -> list[Unit]:
    """All units, in an order in which their inputs are there, as near to the network's as that allows.

    A layer that takes a residual waits for it, wherever the network has the operations that make it.
    """
    found = []
    taken: set[int] = set()
    for chain in plan.chains:
        members: list[int] = []
        for stage in chain:
            members += [stage, *ways_out[stage].operations]
        found.append(_unit(graph.operations, members))
        taken.update(members)
    found += [_unit(graph.operations, [i]) for i in range(len(graph.operations)) if i not in taken]
    waiting = sorted(found, key=lambda unit: unit.operations[0])
    known = {*graph.inputs, *graph.constants}
    ordered = []
    while waiting:
        ready = next((unit for unit in waiting if unit.inputs <= known), None)
        assert ready is not None, "the operations of a network depend on each other in a circle"
        waiting.remove(ready)
        ordered.append(ready)
        known |= ready.outputs
    return ordered


def _unit(operations: Sequence[QOperation], members: Sequence[int]) -> Unit:
    made = {name for i in members for name in writes(operations[i])}
    read = {name for i in members for name in reads(operations[i])}
    return Unit(tuple(members), frozenset(read - made), frozenset(made))
