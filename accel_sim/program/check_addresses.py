"""The rules of what instructions refer to: descriptors, and addresses in the memories."""

from __future__ import annotations

import numpy as np

from accel_sim.program.accesses import ACCUMULATOR, DRAM, HIGH, INDEX, LOW, MEMORY, SCRATCHPAD, WIDTH, Accesses
from accel_sim.program.code_order import Code, Flags, Ints, check_table_index, refuse
from accel_sim.program.isa import Program, Space, VectorFunction
from accel_sim.program.matmul_operands import check_matmuls
from accel_sim.program.memories import Memories, at_least, loop_columns, product, window_columns
from accel_sim.program.record_layouts import Opcode
from accel_sim.program.records import descriptor_table
from accel_sim.spec import MachineSpec

_MOST_OPERATIONS = 1 << 40
"""Of one vector instruction; so that cycles can be added up."""


def check_addresses(program: Program, spec: MachineSpec, code: Code, accesses: Accesses) -> None:
    """Raises :class:`ProgramError` for the first rule that is broken; collects what is accessed."""
    memories = Memories(program, spec, accesses)
    _check_loads(code, memories)
    check_matmuls(program, code, memories)
    _check_vectors(program, code, memories)
    _check_stores(program, spec, code, memories)


def _check_loads(code: Code, memories: Memories) -> None:
    at, loads = code.only(Opcode.LOAD)
    run, counts, dram_strides, chip_strides = loop_columns(at, loads)
    memories.add("source", at, DRAM, False, loads["dram_address"].astype(np.int64), run, counts, dram_strides)
    for space, memory in ((Space.SCRATCHPAD, SCRATCHPAD), (Space.ACCUMULATOR, ACCUMULATOR)):
        of = loads["space"] == space
        address = loads["chip_address"][of].astype(np.int64)
        memories.add("target", at[of], memory, True, address, run[of], counts[of], chip_strides[of])


def _check_vectors(program: Program, code: Code, memories: Memories) -> None:
    at, vectors = code.only(Opcode.VECTOR)
    check_table_index(at, vectors["spec"], "spec", len(program.vectors))
    elements, operations = vectors["elements"].astype(np.int64), vectors["operations"].astype(np.int64)
    at_least(at, elements, "elements", 1)
    at_least(at, operations, "operations", 0)
    refuse(
        operations > _MOST_OPERATIONS,
        at,
        lambda place: f"operations is {operations[place]}; expected at most {_MOST_OPERATIONS}",
    )
    memories.add("output", at, ACCUMULATOR, True, vectors["output_address"].astype(np.int64), elements)
    if not len(at):
        return
    specs = descriptor_table("vectors", program.vectors)[vectors["spec"]]
    function = specs["function"]
    pools = np.isin(function, (VectorFunction.MAX_POOL, VectorFunction.AVERAGE_POOL))
    binary = np.isin(function, (VectorFunction.SUM, VectorFunction.PRODUCT))
    size = elements.copy()
    if pools.any():
        window = window_columns(program, specs["window"][pools])
        results = product(window["images"], window["channels"], window["outputs"])
        refuse(
            results != elements[pools],
            at[pools],
            lambda place: f"elements is {elements[pools][place]}; the pool has {results[place]} results",
        )
        size[pools] = product(window["images"], window["channels"], window["positions"])
    reads = function != VectorFunction.FILL
    a_address, b_address = vectors["a_address"].astype(np.int64), vectors["b_address"].astype(np.int64)
    memories.add("a", at[reads], SCRATCHPAD, False, a_address[reads], size[reads])
    refuse(
        ~binary & (b_address != -1),
        at,
        lambda place: f"b_address is {b_address[place]}; expected -1, the function has one operand",
    )
    memories.add("b", at[binary], SCRATCHPAD, False, b_address[binary], size[binary])


def _check_stores(program: Program, spec: MachineSpec, code: Code, memories: Memories) -> None:
    at, stores = code.only(Opcode.STORE)
    fields = {name: stores[name].astype(np.int64) for name in stores.dtype.names}
    run, counts, dram_strides, chip_strides = loop_columns(at, stores)
    at_least(at, fields["lanes"], "lanes", 1)
    at_least(at, fields["residual_address"], "residual_address", -1)
    lanes = fields["lanes"]
    refuse(run % lanes != 0, at, lambda place: f"run is {run[place]}; expected a multiple of lanes, {lanes[place]}")
    check_table_index(at, fields["output"], "output", len(program.outputs), -1)
    refuse(
        (fields["block_channels"] != 0) & ((counts[:, 0] == 1) | (fields["output"] < 0)),
        at,
        lambda place: f"block_channels is {fields['block_channels'][place]}; expected 0, nothing reads it",
    )
    refuse(
        (fields["first_channel"] != 0) & (fields["output"] < 0),
        at,
        lambda place: f"first_channel is {fields['first_channel'][place]}; expected 0, nothing reads it",
    )
    words = fields["output"] >= 0
    residual = fields["residual_address"] >= 0
    _check_ways_out(program, spec, at, fields, counts, words, residual)
    memories.check_aligned(at[words], fields["accumulator_address"][words])
    word = np.where(words, memories.word_bytes, 1)
    base = fields["accumulator_address"]
    memories.add("source", at, ACCUMULATOR, False, base, run * word, counts, chip_strides * word[:, None])
    base = fields["residual_address"][residual]
    args = (base, run[residual], counts[residual], chip_strides[residual])
    memories.add("residual", at[residual], ACCUMULATOR, False, *args)
    for memory, of in ((SCRATCHPAD, fields["to_scratchpad"] == 1), (DRAM, fields["to_scratchpad"] == 0)):
        args = (fields["address"][of], run[of], counts[of], dram_strides[of])
        memories.add("target", at[of], memory, True, *args)
    _check_constants(program, memories.accesses.parts[-1] if len(at) else np.zeros((0, WIDTH), np.int64))


def _check_constants(program: Program, targets: Ints) -> None:
    """No store reaches over the constants; ``targets`` are the accesses of the last kind of stores."""
    begin, end = program.constants_address, program.constants_address + len(program.constants)
    low, high = targets[:, LOW], targets[:, HIGH]
    refuse(
        (targets[:, MEMORY] == DRAM) & (low < end) & (high > begin) & (begin < end),
        targets[:, INDEX],
        lambda place: f"target: bytes {low[place]} to {high[place]} of the DRAM; the constants are {begin} to {end}",
    )


def _check_ways_out(
    program: Program,
    spec: MachineSpec,
    at: Ints,
    fields: dict[str, Ints],
    counts: Ints,
    words: Flags,
    residual: Flags,
) -> None:
    """Stores against the outputs that they refer to: residuals and scales."""
    refuse(residual & ~words, at, lambda place: "a residual, and output is -1; bytes are stored as they are")
    if residual.any() and not spec.array.residual_on_drain:
        refuse(residual, at, lambda place: f"a residual; {spec.name!r} adds none on the way out")
    if not words.any():
        return
    outputs = descriptor_table("outputs", program.outputs)[fields["output"][words]]
    of, summed = at[words], outputs["sum"] >= 0
    number = fields["output"][words]
    refuse(
        residual[words] & ~summed, of, lambda place: f"a residual, and output {number[place]} has no sum to add it by"
    )
    refuse(~residual[words] & summed, of, lambda place: f"residual_address is -1, and output {number[place]} adds one")
    for name in ("first_channel", "block_channels"):
        at_least(of, fields[name][words], name, 0)
    first = outputs["scales"] + fields["first_channel"][words]
    last = first + (counts[words][:, 0] - 1) * fields["block_channels"][words] + fields["lanes"][words] - 1
    refuse(
        (outputs["per_channel"] == 1) & (last >= len(program.scales)),
        of,
        lambda place: f"needs scales {first[place]} to {last[place]}; the program has {len(program.scales)}",
    )
