"""Programs as text that a person can read, and :func:`accel_sim.program.assembler.assemble` too."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

from accel_sim.program.isa import Halt, Host, Instruction, Load, Matmul, Program, Store, Sync
from accel_sim.program.machine_hash import spec_hash
from accel_sim.program.syntax import ENTRY_FORMS, INSTRUCTION_FORMS, QUEUES
from accel_sim.spec import MachineSpec

LISTING_VERSION = 1

_HEX_BYTES = 32
_SCALES_PER_LINE = 8
_FORM_OF = {form.cls: form for form in INSTRUCTION_FORMS.values()}


def disassemble(program: Program, spec: MachineSpec | None = None, data: bool = True) -> str:
    """The whole program as text: ``assemble(disassemble(p)) == p``.

    ``spec`` adds the machine's name to the header, as a comment. With ``data`` False the constants and the graphs of
    host calls stand there by size and SHA-256 only, and the listing is for reading alone.
    """
    return "".join(line + "\n" for line in _lines(program, spec, data))


def write_listing(program: Program, path: str | Path, spec: MachineSpec | None = None, data: bool = True) -> None:
    """Writes :func:`disassemble`'s text to ``path`` (UTF-8)."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in _lines(program, spec, data))


def instruction_text(instruction: Instruction) -> str:
    """One instruction as it stands in a listing: mnemonic and fields."""
    form = _FORM_OF[type(instruction)]
    return " ".join([f"{form.name:<7}", *form.words(instruction)]).rstrip()


def _lines(program: Program, spec: MachineSpec | None, data: bool) -> Iterator[str]:
    yield f".program version={LISTING_VERSION} columns={program.columns} dram_bytes={program.dram_bytes}"
    yield f".machine {program.spec_hash.hex()}"
    yield from (f"; {line}" for line in _summary(program, spec))
    for directive, (section, form) in ENTRY_FORMS.items():
        entries = getattr(program, section)
        if entries:
            yield ""
        for index, entry in enumerate(entries):
            words = form.words(entry)
            if directive == ".call":
                yield " ".join([directive, str(index), *words, *_blob_words(entry.model, data)])
                yield from _hex(entry.model if data else b"")
            else:
                yield " ".join([directive, str(index), *words])
    if program.scales:
        yield ""
    for at in range(0, len(program.scales), _SCALES_PER_LINE):
        yield " ".join(
            [".scales", str(at), *(float(value).hex() for value in program.scales[at : at + _SCALES_PER_LINE])]
        )
    for index, table in enumerate(program.tables):
        yield ""
        yield f".table {index}"
        yield from _hex(table)
    yield ""
    yield ".code"
    yield from _code(program)
    yield ""
    words = _blob_words(program.constants, data)
    yield " ".join([".constants", f"address={program.constants_address:#x}", *words])
    yield from _hex(program.constants if data else b"")


def _code(program: Program) -> Iterator[str]:
    for index, instruction in enumerate(program.code):
        if isinstance(instruction, Sync | Host | Halt):
            yield ""
        if isinstance(instruction, Sync) and 0 <= instruction.marker < len(program.markers):
            marker = program.markers[instruction.marker]
            form = ENTRY_FORMS[".marker"][1]
            name, op = form.fields[0].write(marker.name), form.fields[1].write(marker.op)
            predicted = (
                f"{marker.predicted_cycles} cycles predicted" if marker.predicted_cycles >= 0 else "no prediction"
            )
            yield f"; layer {instruction.marker} {name}, {op}: {predicted}, {marker.macs} MACs"
        text = instruction_text(instruction)
        yield f"{index:6d} {QUEUES[text.split(' ', 1)[0]]:<7} {text}"


def _summary(program: Program, spec: MachineSpec | None) -> Iterator[str]:
    if spec is not None:
        same = "" if spec_hash(spec) == program.spec_hash else ", for which this program is not"
        array, pads = spec.array, spec.scratchpads
        yield (
            f"machine {spec.name}: {array.rows}x{array.columns}, {pads.input_kib} + {pads.weight_kib} KiB scratchpad, "
            f"{pads.accumulator_kib} KiB accumulators{same}"
        )
    counts = Counter(_FORM_OF[type(instruction)].name for instruction in program.code)
    yield f"{len(program.code)} instructions: " + ", ".join(f"{counts[name]} {name}" for name in QUEUES if counts[name])
    loaded = stored = macs = 0
    for instruction in program.code:
        if isinstance(instruction, Load | Store):
            moved = instruction.loops.run * prod(instruction.loops.counts)
            if isinstance(instruction, Load):
                loaded += moved
            elif not instruction.to_scratchpad:
                stored += moved
        elif isinstance(instruction, Matmul) and 0 <= instruction.window < len(program.windows):
            window = program.windows[instruction.window]
            taps = prod(window.kernel) * instruction.channels * instruction.filters
            macs += window.images * prod(window.out) * taps
    yield f"{loaded} bytes loaded, {stored} bytes stored, {macs} MACs; {len(program.constants)} bytes of constants"
    predicted = [marker.predicted_cycles for marker in program.markers if marker.predicted_cycles >= 0]
    yield f"{len(program.markers)} layers, {len(predicted)} with a prediction, {sum(predicted)} cycles together"


def _blob_words(blob: bytes, data: bool) -> list[str]:
    words = [f"bytes={len(blob)}"]
    return words if data else [*words, f"sha256={hashlib.sha256(blob).hexdigest()}"]


def _hex(blob: bytes) -> Iterator[str]:
    for at in range(0, len(blob), _HEX_BYTES):
        yield f"  {at:08x}: {blob[at : at + _HEX_BYTES].hex(' ', -4)}"
