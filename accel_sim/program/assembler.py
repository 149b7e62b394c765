"""Reads listings: the inverse of :func:`accel_sim.program.listing.disassemble`, and a way to write programs by hand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NoReturn

from accel_sim.program.container import TABLE_BYTES
from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Program
from accel_sim.program.listing import LISTING_VERSION
from accel_sim.program.syntax import ENTRY_FORMS, INSTRUCTION_FORMS, QUEUES, REQUIRED, Form, read_float

_WORD = re.compile(r"[^\s;=\"\[\]]+")
_TEXT = r'"(?:[^"\\]|\\.)*"'
_VALUE = re.compile(rf"{_TEXT}|\[\s*(?:{_TEXT}\s*(?:,\s*{_TEXT}\s*)*)?\]|[^\s;\"\[\]]*")
_HEX_LINE = re.compile(r"\s*([0-9a-f]{8,16}):((?: [0-9a-f]{2,8})+)\s*(?:;.*)?")
_DIRECTIVES = (".program", ".machine", ".scales", ".table", ".code", ".constants", *ENTRY_FORMS)


def assemble(text: str) -> Program:
    """The program that a listing describes. Raises :class:`ProgramError` with line and column (both from 1 on)."""
    return _Assembler().run(text)


def read_listing(path: str | Path) -> Program:
    """Assembles a file. Raises :class:`ProgramError`; OSError where the file cannot be read."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProgramError(f"{path} is no UTF-8: {error.reason} at byte {error.start}", "listing", 1) from error
    return assemble(text)


class _Line:
    """One line and how far it has been read."""

    def __init__(self, text: str, number: int) -> None:
        self.text = text
        self.number = number
        self.at = 0
        self.skip()

    def skip(self) -> None:
        rest = self.text[self.at :]
        self.at = len(self.text) - len(rest.lstrip(" \t"))

    @property
    def ended(self) -> bool:
        return self.at >= len(self.text) or self.text[self.at] == ";"

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        raise ProgramError(what, "listing", self.number, (self.at if at is None else at) + 1)

    def peek(self) -> str:
        match = _WORD.match(self.text, self.at)
        return match.group() if match else ""

    def word(self, expected: str) -> str:
        word = self.peek()
        if not word:
            self.fail(f"expected {expected}, found {self.rest()}")
        self.at += len(word)
        self.skip()
        return word

    def rest(self) -> str:
        return "the end of the line" if self.ended else repr(self.text[self.at : self.at + 40])

    def end(self) -> None:
        if not self.ended:
            self.fail(f"expected the end of the line, found {self.rest()}")

    def index(self, expected: int) -> None:
        begin = self.at
        word = self.word(f"the index {expected}")
        if word != str(expected):
            self.fail(f"the index is {word}; expected {expected}", begin)

    def values(self, form: Form, extra: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, tuple[str, int]]]:
        """All ``key=value`` up to the end: those of ``form`` read, those in ``extra`` as text with their column."""
        known = {field.key: field for field in form.fields}
        found: dict[str, Any] = {}
        others: dict[str, tuple[str, int]] = {}
        while not self.ended:
            begin = self.at
            key = self.peek()
            if key not in known and key not in extra:
                names = ", ".join((*known, *extra)) or "none"
                self.fail(f"{form.name} has no field {key or self.text[begin]!r}; its fields: {names}")
            if key in found or key in others:
                self.fail(f"field {key} stands there twice", begin)
            self.at += len(key)
            if self.at >= len(self.text) or self.text[self.at] != "=":
                self.fail(f"expected = after {key}")
            self.at += 1
            match = _VALUE.match(self.text, self.at)
            value = match.group() if match else ""
            if key in extra:
                others[key] = value, self.at
            else:
                try:
                    found[key] = known[key].read(value)
                except ValueError as error:
                    self.fail(f"{key} is {value or self.rest()!s}; expected {error}")
            self.at += len(value)
            if not self.ended and self.text[self.at] not in " \t":
                self.fail(f"expected a blank after {key}, found {self.rest()}")
            self.skip()
        missing = [field.key for field in form.fields if field.default is REQUIRED and field.key not in found]
        if missing:
            self.fail(f"{form.name} lacks {', '.join(missing)}")
        missing = [key for key in extra if key not in others and key != "sha256"]
        if missing:
            self.fail(f"{form.name} lacks {', '.join(missing)}")
        return found, others


class _Assembler:
    """Collects a program's parts from lines."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self.lists: dict[str, list[Any]] = {section: [] for section, _ in ENTRY_FORMS.values()}
        self.lists |= {"code": [], "scales": [], "tables": []}
        self.in_code = False
        self.blob: bytearray | None = None
        self.blob_bytes = 0
        self.blob_line: _Line | None = None
        self.finish: Any = None

    def run(self, text: str) -> Program:
        number = 0
        for number, content in enumerate(text.split("\n"), start=1):
            line = _Line(content.removesuffix("\r"), number)
            if line.ended:
                continue
            if self.blob is not None and len(self.blob) < self.blob_bytes:
                self.hex_line(line)
            elif line.text[line.at] == ".":
                self.directive(line)
            elif self.in_code:
                self.instruction(line)
            else:
                line.fail(f"expected one of {', '.join(_DIRECTIVES)}, found {line.rest()}")
        self.close_blob()
        for directive, part in ((".program", "columns"), (".machine", "spec_hash"), (".constants", "constants")):
            if part not in self.parts:
                raise ProgramError(f"the listing ends without {directive}", "listing", number)
        lists: dict[str, Any] = {name: tuple(entries) for name, entries in self.lists.items()}
        return Program(**self.parts, **lists)

    def directive(self, line: _Line) -> None:
        self.close_blob()
        begin = line.at
        name = line.word("a directive")
        if name not in _DIRECTIVES:
            line.fail(f"expected one of {', '.join(_DIRECTIVES)}, found {name}", begin)
        self.in_code = name == ".code"
        if name in ENTRY_FORMS:
            section, form = ENTRY_FORMS[name]
            entries = self.lists[section]
            line.index(len(entries))
            if name == ".call":
                values, others = line.values(form, ("bytes", "sha256"))
                entry = form.build(values)
                self.open_blob(line, others, lambda blob: entries.append(dataclasses.replace(entry, model=blob)))
            else:
                entries.append(form.build(line.values(form)[0]))
        elif name == ".scales":
            line.index(len(self.lists["scales"]))
            while not line.ended:
                begin = line.at
                word = line.word("a number")
                try:
                    self.lists["scales"].append(read_float(word))
                except ValueError as error:
                    line.fail(f"a scale is {word}; expected {error}", begin)
        elif name == ".table":
            line.index(len(self.lists["tables"]))
            line.end()
            self.open_blob(line, {"bytes": (str(TABLE_BYTES), 0)}, self.lists["tables"].append)
        elif name == ".code":
            line.end()
        else:
            self.header(line, name, begin)

    def header(self, line: _Line, name: str, begin: int) -> None:
        """``.program``, ``.machine`` and ``.constants``, each of which stands there once."""
        part = {".program": "columns", ".machine": "spec_hash", ".constants": "constants_address"}[name]
        if part in self.parts:
            line.fail(f"{name} stands there twice", begin)
        if name == ".machine":
            begin = line.at
            word = line.word("64 hexadecimal digits")
            if not re.fullmatch(r"[0-9a-f]{64}", word):
                line.fail(f"found {word}; expected 64 hexadecimal digits", begin)
            line.end()
            self.parts[part] = bytes.fromhex(word)
        elif name == ".program":
            _, others = line.values(Form(name, Program, ()), ("version", "columns", "dram_bytes"))
            if _whole(line, *others["version"]) != LISTING_VERSION:
                line.fail(f"version is {others['version'][0]}; expected {LISTING_VERSION}", others["version"][1])
            self.parts["columns"] = _whole(line, *others["columns"])
            self.parts["dram_bytes"] = _whole(line, *others["dram_bytes"])
        else:
            _, others = line.values(Form(name, Program, ()), ("address", "bytes", "sha256"))
            self.parts[part] = _whole(line, *others["address"])
            self.open_blob(line, others, lambda blob: self.parts.__setitem__("constants", blob))

    def instruction(self, line: _Line) -> None:
        code = self.lists["code"]
        if line.peek().isdigit():  # index and queue are for readers; who writes by hand may leave them out
            line.index(len(code))
        queue, at_queue = "", line.at
        if line.peek() in QUEUES.values() and re.match(r"\S+[ \t]+[a-z]+(?![\w=])", line.text[line.at :]):
            queue = line.word("a queue")
        begin = line.at
        name = line.word("an instruction")
        if name not in INSTRUCTION_FORMS:
            line.fail(f"expected one of {', '.join(INSTRUCTION_FORMS)}, found {name}", begin)
        if queue and queue != QUEUES[name]:
            line.fail(f"the queue is {queue}; expected {QUEUES[name]}", at_queue)
        form = INSTRUCTION_FORMS[name]
        code.append(form.build(line.values(form)[0]))

    def open_blob(self, line: _Line, words: dict[str, tuple[str, int]], finish: Any) -> None:
        if "sha256" in words:
            line.fail("the listing was written without its data and cannot be assembled", words["sha256"][1])
        size = _whole(line, *words["bytes"])
        if size < 0:
            line.fail(f"bytes is {size}; expected 0 or more", words["bytes"][1])
        self.blob, self.blob_bytes, self.blob_line, self.finish = bytearray(), size, line, finish

    def close_blob(self) -> None:
        if self.blob is None or self.blob_line is None:
            return
        if len(self.blob) != self.blob_bytes:
            self.blob_line.fail(f"{len(self.blob)} bytes follow; expected {self.blob_bytes}", 0)
        self.finish(bytes(self.blob))
        self.blob = None

    def hex_line(self, line: _Line) -> None:
        blob = self.blob if self.blob is not None else bytearray()
        match = _HEX_LINE.fullmatch(line.text)
        if match is None or len(match.group(2).replace(" ", "")) % 2:
            line.fail(f"expected bytes such as '{len(blob):08x}: 00ff0102', found {line.rest()}")
        if int(match.group(1), 16) != len(blob):
            line.fail(f"the offset is {match.group(1)}; expected {len(blob):08x}")
        blob += bytes.fromhex(match.group(2))
        if len(blob) > self.blob_bytes:
            line.fail(f"{len(blob)} bytes so far; expected {self.blob_bytes}")


def _whole(line: _Line, text: str, at: int) -> int:
    body = text.removeprefix("0x")
    if not re.fullmatch(r"[0-9]{1,20}" if body == text else r"[0-9a-f]{1,16}", body):
        line.fail(f"found {text!r}; expected a whole number of 0 or more", at)
    return int(body, 10 if body == text else 16)
