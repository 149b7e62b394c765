"""Finds in a network what the accelerator runs as one: chains of stages, and what is applied on the way out of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from codegen.asic_ops import (
    ACTIVATIONS,
    CONSTANT_ARITHMETIC,
    FREE,
    RECURRENT,
    TRANSPARENT,
    elements,
    is_shape_arithmetic,
    vector_operations,
)
from passes.core.cost import OpWork


class Role(Enum):
    """Which unit an operator falls to; the value is the name that reports use."""

    STAGE = "array"
    MATMUL = "array, two activations"
    EPILOGUE = "on the way out"
    VECTOR = "vector"
    FREE = "free"
    HOST = "host"


@dataclass(frozen=True)
class Schedule:
    """What runs where, by the operators' places in the network.

    ``roles``: one per operator. ``chains``: stages that follow each other directly; every stage is in one of them.
    ``sums``: by the stage that takes a residual, the last of its chain, the addition; its role is EPILOGUE.
    """

    roles: tuple[Role, ...]
    chains: tuple[tuple[int, ...], ...]
    sums: dict[int, int]


def schedule(
    ops: Sequence[OpWork], residual_on_drain: bool, on_host: Collection[int] = (), vector_epilogues: bool = True
) -> Schedule:
    """Finds chains, what is applied on the way out, and a unit for everything else.

    An activation, a BatchNormalization, or arithmetic with a constant per channel is applied on the way out if it alone
    reads the result of a stage, of a product of activations, or of an operator on the vector unit. Two stages form a
    chain if the second is the only reader of what the first gives, in the same shape, and nothing stands between them
    but what is applied on the way out, or does nothing to int8 data.

    With ``residual_on_drain``, so is the sum of a stage's result, with no more than a bias, a scale or a
    BatchNormalization applied, and another map of the same shape, if the sum alone reads that result: the later stage
    takes the other map, as a residual, if both are such results. The other map can always be had before the stage
    runs, whatever the order of ``ops``: all that depends on the stage goes through the sum.

    ``on_host``: operators that the host runs, whatever they are. ``vector_epilogues`` False: nothing is applied to a
    result of the vector unit.
    """
    readers = Counter(name for op in ops for name in set(op.inputs))
    # The operator that each tensor comes from, if nothing but fused and transparent ones followed, and whether a chain
    # may still go on there.
    source: dict[str, int] = {}
    chainable: set[str] = set()
    summable: set[str] = set()
    sums: dict[int, int] = {}
    roles: list[Role] = []
    previous: dict[int, int] = {}
    for i, op in enumerate(ops):
        alone = [name for name in op.inputs if name in source and readers[name] == 1]
        before = source[alone[0]] if len(alone) == 1 and len(op.input_shapes) <= 1 else None
        follows_stage = before is not None and (vector_epilogues or roles[before] is not Role.VECTOR)
        role = Role.HOST if i in on_host else _role(op, follows_stage)
        stage = _sum_stage(ops, op, alone, source, summable) if residual_on_drain and role is Role.VECTOR else None
        if stage is not None:
            role = Role.EPILOGUE
            sums[stage] = i
        roles.append(role)
        if role is Role.STAGE and before is not None and alone[0] in chainable and _connects(ops[before], op):
            previous[i] = before
        if len(op.outputs) != 1:
            continue
        if stage is not None:
            source[op.outputs[0]] = stage
        elif role in (Role.STAGE, Role.MATMUL, Role.VECTOR):
            source[op.outputs[0]] = i
            if role is Role.STAGE:
                chainable.add(op.outputs[0])
                summable.add(op.outputs[0])
        elif before is not None and (role is Role.EPILOGUE or op.op in TRANSPARENT):
            source[op.outputs[0]] = before
            if alone[0] in chainable:
                chainable.add(op.outputs[0])
            if alone[0] in summable and op.op not in ACTIVATIONS:
                summable.add(op.outputs[0])
    follows = {before: after for after, before in previous.items()}
    chains: list[tuple[int, ...]] = []
    for i, role in enumerate(roles):
        if role is Role.STAGE and i not in previous:
            chain = [i]
            while chain[-1] in follows:
                chain.append(follows[chain[-1]])
            chains.append(tuple(chain))
    return Schedule(tuple(roles), tuple(chains), sums)


def _role(op: OpWork, can_follow: bool) -> Role:
    if op.op == "MatMul" and len(op.input_shapes) == 2 and min(map(len, op.input_shapes + op.output_shapes)) >= 2:
        return Role.MATMUL  # no weights: the second operand is an activation as well
    if op.stage is not None:
        return Role.HOST if op.op in RECURRENT or op.stage.geometry.ndim > 3 else Role.STAGE
    if op.op in FREE or is_shape_arithmetic(op):
        return Role.FREE
    if can_follow and _is_epilogue(op):
        return Role.EPILOGUE
    if vector_operations(op) is None:
        return Role.HOST
    return Role.VECTOR if elements(op.output_shapes) else Role.FREE


def _is_epilogue(op: OpWork) -> bool:
    if op.input_shapes != op.output_shapes:
        return False
    if op.op in ACTIVATIONS or op.op == "BatchNormalization":
        return True
    # A constant as large as the map would have to be loaded: that is no bias.
    return op.op in CONSTANT_ARITHMETIC and op.weight_params <= max(op.input_shapes[0])


def _sum_stage(
    ops: Sequence[OpWork], op: OpWork, alone: list[str], source: dict[str, int], summable: set[str]
) -> int | None:
    """The stage that takes a residual, if ``op`` adds one to its result: the last of those that could."""
    if op.op != "Add" or len(set(op.inputs)) != 2 or {*op.input_shapes} != {*op.output_shapes}:
        return None
    stages = [source[name] for name in alone if name in summable]
    # A reshaped result would be another map to the store.
    stages = [i for i in stages if ops[i].output_shapes == op.output_shapes]
    return max(stages, default=None)


def _connects(first: OpWork, second: OpWork) -> bool:
    a, b = first.stage, second.stage
    if a is None or b is None or a.out_channels != b.in_channels or a.batch != b.batch:
        return False
    return a.output_spatial == b.spatial if a.geometry.ndim and b.geometry.ndim else a.geometry.ndim == b.geometry.ndim
