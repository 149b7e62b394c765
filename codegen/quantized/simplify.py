"""Puts operations in order, names tensors as the network does, merges tables, drops what nobody reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from codegen.quantized.arithmetic import product_of, sum_of
from codegen.quantized.graph import QOperation, QProduct, QSum, QTable, QuantizedGraph
from codegen.quantized.operands import reads, writes


def simplify(graph: QuantizedGraph) -> QuantizedGraph:
    """The same function of the same inputs. Chains of tables become one table, as does a sum or a product of a tensor
    and a table of it (x * sigmoid(x)); a tensor that is an output of the network stays."""
    operations = _ordered(graph, list(graph.operations))
    while True:
        merged = _merged(graph, _needed(graph, operations))
        if merged is None:
            break
        operations = merged
    operations = _needed(graph, operations)
    names = {*graph.inputs, *graph.outputs}
    names |= {name for operation in operations for name in (*reads(operation), *writes(operation))}
    return replace(
        graph,
        tensors={name: tensor for name, tensor in graph.tensors.items() if name in names},
        operations=tuple(operations),
        constants={name: value for name, value in graph.constants.items() if name in names},
        host_tensors={name: tensor for name, tensor in graph.host_tensors.items() if name in names},
    )


def _ordered(graph: QuantizedGraph, operations: list[QOperation]) -> list[QOperation]:
    """An order in which every operation finds its inputs, as near as can be to the one given."""
    known = {*graph.inputs, *graph.constants}
    made = {name for operation in operations for name in writes(operation)}
    known |= {n for operation in operations for n in reads(operation) if n not in made}
    ordered: list[QOperation] = []
    while operations:
        later = []
        for operation in operations:
            if all(name in known for name in reads(operation)):
                ordered.append(operation)
                known.update(writes(operation))
            else:
                later.append(operation)
        assert len(later) < len(operations), "the operations form a circle"
        operations = later
    return ordered


def _needed(graph: QuantizedGraph, operations: list[QOperation]) -> list[QOperation]:
    wanted = set(graph.outputs)
    kept = []
    for operation in reversed(operations):
        if wanted.intersection(writes(operation)):
            kept.append(operation)
            wanted.update(reads(operation))
    return kept[::-1]


def _merged(graph: QuantizedGraph, operations: list[QOperation]) -> list[QOperation] | None:
    """``operations`` with one pair merged, or None where there is none left."""
    tables = {operation.output: operation for operation in operations if isinstance(operation, QTable)}
    readers = Counter(name for operation in operations for name in reads(operation))

    def gone(name: str) -> bool:
        """True if nothing else reads the tensor, so that merging saves an operation."""
        return readers[name] == 1 and name not in graph.outputs

    for place, operation in enumerate(operations):
        if isinstance(operation, QTable) and (first := tables.get(operation.input)) and gone(first.output):
            merged = QTable(
                operation.name, f"{first.op}+{operation.op}", first.input, operation.output,
                _compose(first.table, operation.table), (*first.nodes, *operation.nodes),
            )  # fmt: skip
        elif isinstance(operation, QSum | QProduct) and (pair := _of_one(graph, operation, tables)):
            source, steps = pair
            if not any(gone(step.output) for step in steps) and operation.a != operation.b:
                continue
            merged = QTable(
                operation.name, "+".join([*(step.op for step in steps), operation.op]), source, operation.output,
                _tabulated(graph, operation, source, tables),
                (*(n for step in steps for n in step.nodes), *operation.nodes),
            )  # fmt: skip
        else:
            continue
        return [*operations[:place], merged, *operations[place + 1 :]]
    return None


def _of_one(
    graph: QuantizedGraph, operation: QSum | QProduct, tables: dict[str, QTable]
) -> tuple[str, tuple[QTable, ...]] | None:
    """The tensor that both operands are tables of, and those tables."""
    if graph.tensors[operation.a].shape != graph.tensors[operation.b].shape:
        return None
    if operation.a == operation.b:
        return operation.a, ()
    for one, other in ((operation.a, operation.b), (operation.b, operation.a)):
        table = tables.get(one)
        if table is not None and table.input == other:
            return other, (table,)
    a, b = tables.get(operation.a), tables.get(operation.b)
    if a is not None and b is not None and a.input == b.input:
        return a.input, (a, b)
    return None


def _compose(first: bytes, second: bytes) -> bytes:
    return bytes(second[value] for value in first)


def _tabulated(graph: QuantizedGraph, operation: QSum | QProduct, source: str, tables: dict[str, QTable]) -> bytes:
    every = np.arange(256, dtype=np.uint8)

    def operand(name: str) -> np.ndarray[tuple[int], np.dtype[np.int8 | np.uint8]]:
        table = every if name == source else np.frombuffer(tables[name].table, np.uint8)
        return table.view(np.int8 if graph.tensors[name].signed else np.uint8)

    a, b = operand(operation.a), operand(operation.b)
    if isinstance(operation, QSum):
        return sum_of(graph, operation, a, b).tobytes()
    return product_of(graph, operation, a, b).tobytes()
