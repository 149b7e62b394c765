"""Whether a program can run on a machine, decided before it does; docs/program.md lists the rules.

Here are the rules of the program as a whole and of its tables. Those of the instructions are in
:mod:`~accel_sim.program.code_order` and :mod:`~accel_sim.program.check_addresses`, those of the queues' tokens in
:mod:`~accel_sim.program.token_run`, of buffers used at the same time in :mod:`~accel_sim.program.races`. What only a
run can tell (a byte that is read before it was written) is the engine's.
"""

from __future__ import annotations

import itertools
from dataclasses import fields
from math import prod

import numpy as np

from accel_sim.program.accesses import DRAM, HIGH, MEMORY, Accesses
from accel_sim.program.check_addresses import check_addresses
from accel_sim.program.code_order import Code, check_order
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Program, Tensor, VectorFunction, VectorSpec
from accel_sim.program.machine_hash import spec_hash
from accel_sim.program.memories import product, window_columns
from accel_sim.program.races import check_races
from accel_sim.program.record_layouts import Opcode
from accel_sim.program.token_run import run_tokens
from accel_sim.spec import MachineSpec

_MOST_DRAM_BYTES = 1 << 48
_SPARE_DRAM_BYTES = 64
"""Behind the last byte of the DRAM that anything uses; more room is no part of an image."""

_MOST_FACTOR = 2.0**32
"""Of what is multiplied with sums or bytes; with it no product leaves float32."""

_READ: dict[VectorFunction, tuple[str, ...]] = {
    VectorFunction.COPY: (),
    VectorFunction.SUM: ("sum",),
    VectorFunction.PRODUCT: ("ratio", "a_zero", "b_zero", "zero_point", "low", "high"),
    VectorFunction.TABLE: ("table",),
    VectorFunction.MAX_POOL: ("window",),
    VectorFunction.AVERAGE_POOL: ("window", "ratio", "divisor", "a_zero", "zero_point", "low", "high", "count_padding"),
    VectorFunction.FILL: ("zero_point",),
}
"""Fields of a :class:`VectorSpec` that a function reads, beside ``signed``."""


def check_program(program: Program, spec: MachineSpec) -> None:
    """Raises :class:`ProgramError`, with the instruction's index where it is about one, unless ``program`` can run.

    A few seconds for 300 000 instructions.
    """
    _check_whole(program, spec)
    _check_tables(program)
    _check_tensors(program)
    code = Code.of(program)
    accesses = Accesses()
    check_order(program, spec, code)
    check_addresses(program, spec, code, accesses)
    _check_markers(program, code)
    _check_dram_end(program, accesses)
    clocks = run_tokens(code)
    check_races(code, clocks, accesses)


def _check_whole(program: Program, spec: MachineSpec) -> None:
    if program.spec_hash != spec_hash(spec):
        raise ProgramError(
            f"the program is for machine {program.spec_hash.hex()}; {spec.name!r} is {spec_hash(spec).hex()}", "header"
        )
    if program.columns != spec.array.columns:
        raise ProgramError(f"columns is {program.columns}; expected the array's {spec.array.columns}", "header")
    if not 0 <= program.dram_bytes <= _MOST_DRAM_BYTES:
        raise ProgramError(f"dram_bytes is {program.dram_bytes}; expected 0 to {_MOST_DRAM_BYTES}", "header")
    end = program.constants_address + len(program.constants)
    if program.constants_address < 0 or end > program.dram_bytes:
        raise ProgramError(
            f"bytes {program.constants_address} to {end}; the DRAM has {program.dram_bytes}", "constants"
        )


def _byte_limits(signed: bool) -> tuple[int, int]:
    return (-128, 127) if signed else (0, 255)


def _check_range(section: str, index: int, name: str, value: int, smallest: int, largest: int) -> None:
    if not smallest <= value <= largest:
        raise ProgramError(f"{name} is {value}; expected {smallest} to {largest}", section, index)


def _check_clamp(section: str, index: int, low: int, high: int, signed: bool) -> None:
    smallest, largest = _byte_limits(signed)
    _check_range(section, index, "low", low, smallest, largest)
    _check_range(section, index, "high", high, low, largest)


def _check_index(section: str, index: int, name: str, value: int, count: int, needed: bool) -> None:
    """An index of another table; -1 is none, and all that is allowed where nothing reads it."""
    if needed and not 0 <= value < count:
        raise ProgramError(f"{name} is {value}; the program has {count}", section, index)
    if not needed and value != -1:
        raise ProgramError(f"{name} is {value}; expected -1, nothing reads it", section, index)


def _check_tables(program: Program) -> None:
    for index, window in enumerate(program.windows):
        for name in ("images", "channels"):
            _check_range("windows", index, name, getattr(window, name), 1, 1 << 31)
        for name in ("extent", "out", "kernel", "strides", "dilations"):
            for value in getattr(window, name):
                _check_range("windows", index, name, value, 1, 1 << 31)
        for name, steps, count, counts in (
            ("strides", window.strides, "out", window.out),
            ("dilations", window.dilations, "kernel", window.kernel),
        ):
            if any(step != 1 for step, number in zip(steps, counts, strict=True) if number == 1):
                raise ProgramError(
                    f"{name} is {','.join(map(str, steps))}; expected 1 where {count} is 1", "windows", index
                )
        _check_range("windows", index, "pad_value", window.pad_value, *_byte_limits(window.signed))
    for index, output in enumerate(program.outputs):
        _check_index("outputs", index, "scales", output.scales, len(program.scales), True)
        _check_range("outputs", index, "zero_point", output.zero_point, *_byte_limits(output.signed))
        _check_clamp("outputs", index, output.low, output.high, output.signed)
        _check_index("outputs", index, "table", output.table, len(program.tables), output.table != -1)
        _check_index("outputs", index, "sum", output.sum, len(program.sums), output.sum != -1)
        needed = output.sum != -1 and output.sum_table != -1
        _check_index("outputs", index, "sum_table", output.sum_table, len(program.tables), needed)
    for index, entry in enumerate(program.sums):
        _check_clamp("sums", index, entry.low, entry.high, entry.signed)
        for name in ("own_ratio", "other_ratio", "offset"):
            _check_factor("sums", index, name, getattr(entry, name))
    for index, scale in enumerate(program.scales):
        _check_factor("scales", index, "scale", scale)
    for index, vector in enumerate(program.vectors):
        _check_vector(program, index, vector)


def _check_factor(section: str, index: int, name: str, value: float) -> None:
    if not abs(value) <= _MOST_FACTOR:
        raise ProgramError(f"{name} is {value!r}; expected at most {_MOST_FACTOR:.0f} either way", section, index)


def _check_vector(program: Program, index: int, vector: VectorSpec) -> None:
    read = _READ[vector.function]
    for name, count in (("sum", len(program.sums)), ("table", len(program.tables)), ("window", len(program.windows))):
        _check_index("vectors", index, name, getattr(vector, name), count, name in read)
    for field in fields(VectorSpec):
        value = getattr(vector, field.name)
        if field.name not in ("function", "signed", *read) and value != field.default:
            raise ProgramError(
                f"{field.name} is {value!r}; expected {field.default!r}, nothing reads it", "vectors", index
            )
    if "low" in read:
        _check_clamp("vectors", index, vector.low, vector.high, vector.signed)
    # A fill takes its byte as either kind.
    lowest, highest = (-128, 255) if vector.function == VectorFunction.FILL else _byte_limits(vector.signed)
    if "zero_point" in read:
        _check_range("vectors", index, "zero_point", vector.zero_point, lowest, highest)
    for name in ("a_zero", "b_zero"):
        _check_range("vectors", index, name, getattr(vector, name), -128, 255)
    _check_factor("vectors", index, "ratio", vector.ratio)
    if not 1 / _MOST_FACTOR <= vector.divisor <= _MOST_FACTOR:
        raise ProgramError(f"divisor is {vector.divisor!r}; expected more than 0, from 2^-32 to 2^32", "vectors", index)


def _check_tensors(program: Program) -> None:
    places: dict[str, int] = {}
    for index, tensor in enumerate(program.tensors):
        if tensor.name in places:
            raise ProgramError(f"{tensor.name!r} is tensor {places[tensor.name]} too", "tensors", index)
        places[tensor.name] = index
        for extent in tensor.shape:
            _check_range("tensors", index, "shape", extent, 1, _MOST_DRAM_BYTES)
        if tensor.address < 0 or tensor.address + prod(tensor.shape) > program.dram_bytes:
            raise ProgramError(
                f"{tensor.name!r}: bytes {tensor.address} to {tensor.address + prod(tensor.shape)}; the DRAM has "
                f"{program.dram_bytes}",
                *("tensors", index),
            )
        if not tensor.scale > 0:
            raise ProgramError(f"scale is {tensor.scale!r}; expected more than 0", "tensors", index)
        _check_range("tensors", index, "zero_point", tensor.zero_point, *_byte_limits(tensor.signed))
    written = {index for index, tensor in enumerate(program.tensors) if tensor.role != "internal"}
    for index, call in enumerate(program.calls):
        for name in (*call.inputs, *call.outputs):
            if name not in places:
                raise ProgramError(f"{call.name!r}: no tensor is called {name!r}", "calls", index)
        written |= {places[name] for name in call.outputs}
    constants = (program.constants_address, program.constants_address + len(program.constants))
    for index in sorted(written):
        tensor = program.tensors[index]
        if tensor.address < constants[1] and constants[0] < tensor.address + prod(tensor.shape):
            raise ProgramError(
                f"{tensor.name!r} is written and lies in the constants, bytes {constants[0]} to {constants[1]}",
                *("tensors", index),
            )
    for role in ("input", "output"):
        _check_disjoint([(index, t) for index, t in enumerate(program.tensors) if t.role == role])


def _check_markers(program: Program, code: Code) -> None:
    """Predictions are cycles or -1; a layer has no more useful multiply-adds than its products carry out."""
    at, syncs = code.only(Opcode.SYNC)
    hosts, _ = code.only(Opcode.HOST)
    products, records = code.only(Opcode.MATMUL)
    done = np.zeros(len(program.markers))
    if len(products):
        window = window_columns(program, records["window"])
        of = np.searchsorted(at, products) - 1
        counted = product(window["images"], window["outputs"], window["taps"], records["channels"], records["filters"])
        np.add.at(done, syncs["marker"][of[of >= 0]], counted[of >= 0].astype(np.float64))
    on_host = set(syncs["marker"][np.searchsorted(at, hosts) - 1].tolist()) if len(at) else set()
    for index, marker in enumerate(program.markers):
        if marker.predicted_cycles < -1:
            raise ProgramError(f"predicted_cycles is {marker.predicted_cycles}; expected at least -1", "markers", index)
        most = _MOST_DRAM_BYTES if index in on_host else int(done[index])
        _check_range("markers", index, "macs", marker.macs, 0, most)


def _check_dram_end(program: Program, accesses: Accesses) -> None:
    """The DRAM image ends with what is in it."""
    reached = program.constants_address + len(program.constants) if program.constants else 0
    reached = max([reached, *(tensor.address + prod(tensor.shape) for tensor in program.tensors)])
    for part in accesses.parts:
        reached = max(reached, int(part[part[:, MEMORY] == DRAM, HIGH].max(initial=0)))
    if program.dram_bytes > reached + _SPARE_DRAM_BYTES:
        raise ProgramError(
            f"dram_bytes is {program.dram_bytes}; expected at most {reached + _SPARE_DRAM_BYTES}, nothing uses more",
            "header",
        )


def _check_disjoint(tensors: list[tuple[int, Tensor]]) -> None:
    ordered = sorted(tensors, key=lambda entry: entry[1].address)
    for (first, a), (second, b) in itertools.pairwise(ordered):
        end = a.address + prod(a.shape)
        if end > b.address:
            raise ProgramError(
                f"{a.role}s {a.name!r} and {b.name!r} overlap in bytes {b.address} to {end}",
                *("tensors", max(first, second)),
            )
