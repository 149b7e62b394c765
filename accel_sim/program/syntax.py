"""The words of a listing: for each class its name and its fields, in the order and the notation of their lines.

A line is a name and ``key=value`` words in any order. A field that has a default may be left out. Notations: numbers
in decimal, addresses in hexadecimal (a reader takes either anywhere), several numbers with commas, truth as yes or no,
tokens and members of enumerations by name in lower case, floats as ``float.hex`` writes them (a reader takes decimals
too, where float32 holds them exactly), texts and lists of texts as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from typing import Any, get_type_hints

from accel_sim.program.isa import (
    Halt,
    Host,
    HostCall,
    Load,
    Loops,
    Marker,
    Matmul,
    Output,
    Preload,
    Store,
    Sum,
    Sync,
    Tensor,
    Token,
    Vector,
    VectorSpec,
    Window,
)

REQUIRED: Any = dataclasses.MISSING
"""Default of a field that has none."""

_ADDRESSES = frozenset(
    [
        *("address", "dram_address", "chip_address", "input_address", "weight_address", "accumulator_address"),
        *("bias_address", "residual_address", "a_address", "b_address", "output_address"),
    ]
)


@dataclass(frozen=True)
class Field:
    """One ``key=value``: ``path`` is the attribute, ``write`` makes its text, ``read`` takes it.

    ``read`` raises ValueError with what it expected.
    """

    key: str
    path: str
    default: Any
    write: Callable[[Any], str]
    read: Callable[[str], Any]


@dataclass(frozen=True)
class Form:
    """One kind of line. ``build`` makes the entry from the fields' values by key."""

    name: str
    cls: type[Any]
    fields: tuple[Field, ...]

    def words(self, entry: Any) -> list[str]:
        """``key=value`` of the fields that are not their defaults."""
        words = []
        for field, get in zip(self.fields, self._getters, strict=True):
            value = get(entry)
            if field.default is REQUIRED or value != field.default or str(value) == "-0.0":  # which equals 0.0
                words.append(f"{field.key}={field.write(value)}")
        return words

    def build(self, values: dict[str, Any]) -> Any:
        """The entry; ``values`` must hold all fields that have no default."""
        complete = {f.key: values.get(f.key, f.default) for f in self.fields}
        if any(f.path.startswith("loops.") for f in self.fields):
            complete["loops"] = Loops(**{f.name: complete.pop(f.name) for f in dataclasses.fields(Loops)})
        return self.cls(**complete)

    @property
    def _getters(self) -> tuple[Callable[[Any], Any], ...]:
        return _getters(self)


_GETTERS: dict[str, tuple[Callable[[Any], Any], ...]] = {}


def _getters(form: Form) -> tuple[Callable[[Any], Any], ...]:
    if form.name not in _GETTERS:
        _GETTERS[form.name] = tuple(attrgetter(field.path) for field in form.fields)
    return _GETTERS[form.name]


def _read_int(text: str) -> int:
    body = text[1:] if text[:1] == "-" else text
    digits, base = (body[2:], 16) if body[:2] == "0x" else (body, 10)
    # int() alone also takes blanks, underscores, signs after the prefix and digits of other scripts.
    if not digits or not digits.isascii() or not digits.isalnum() or len(digits) > 40:
        raise ValueError("a whole number")
    try:
        value = int(digits, base)
    except ValueError as error:
        raise ValueError("a whole number") from error
    return -value if text[:1] == "-" else value


def _read_ints(text: str) -> tuple[int, ...]:
    return tuple(_read_int(part) for part in text.split(",")) if text else ()


def _read_triple(text: str) -> tuple[int, ...]:
    try:
        values = _read_ints(text)
    except ValueError as error:
        raise ValueError("three whole numbers with commas") from error
    if len(values) != 3:
        raise ValueError("three whole numbers with commas")
    return values


def read_float(text: str) -> float:
    """A float in either notation. ValueError says what was expected."""
    try:
        return float.fromhex(text) if "0x" in text else float(text)
    except (ValueError, OverflowError) as error:
        raise ValueError("a number such as 0x1.8p-1 or 0.75") from error


def _read_bool(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("yes or no")
    return text == "yes"


def _read_text(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("a text in double quotes") from error
    if not isinstance(value, str):
        raise ValueError("a text in double quotes")
    return value


def _read_texts(text: str) -> tuple[str, ...]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError('a list of texts such as ["a","b"]') from error
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError('a list of texts such as ["a","b"]')
    return tuple(values)


def _write_tokens(value: Token) -> str:
    return ",".join(token.name.lower() for token in Token if token in value and token.name) or "none"


def _read_tokens(text: str) -> Token:
    tokens = Token.NONE
    for name in text.split(",") if text != "none" else ():
        known = {str(token.name).lower(): token for token in Token if token}
        if name not in known or known[name] in tokens:
            raise ValueError(f"each of {', '.join(known)} at most once, or none")
        tokens |= known[name]
    return tokens


def _read_member(enum: type[IntEnum]) -> Callable[[str], IntEnum]:
    known = {member.name.lower(): member for member in enum}

    def read(text: str) -> IntEnum:
        if text not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return known[text]

    return read


def _join(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _dump(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, separators=(",", ":"))


def _notation(name: str, kind: Any) -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    if name in _ADDRESSES:
        return lambda value: str(value) if value == -1 else hex(value), _read_int
    if kind is bool:
        return lambda value: "yes" if value else "no", _read_bool
    if kind is Token:
        return _write_tokens, _read_tokens
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return lambda value: value.name.lower(), _read_member(kind)
    if kind is float:
        return lambda value: float(value).hex(), read_float
    if kind is int:
        return str, _read_int
    if kind is str:
        return _dump, _read_text
    if kind == tuple[str, ...]:
        return _dump, _read_texts
    return _join, _read_ints if kind == tuple[int, ...] else _read_triple


def _form(name: str, cls: type[Any], leave_out: tuple[str, ...] = ()) -> Form:
    fields: list[Field] = []
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        if field.name == "loops":
            inner_hints = get_type_hints(Loops)
            for inner in dataclasses.fields(Loops):
                notation = _notation(inner.name, inner_hints[inner.name])
                fields.append(Field(inner.name, f"loops.{inner.name}", inner.default, *notation))
        else:
            fields.append(Field(field.name, field.name, field.default, *_notation(field.name, hints[field.name])))
    return Form(name, cls, tuple(fields))


INSTRUCTION_FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        _form("load", Load),
        _form("preload", Preload),
        _form("matmul", Matmul),
        _form("vector", Vector),
        _form("store", Store),
        _form("sync", Sync),
        _form("host", Host),
        _form("halt", Halt),
    )
}
"""By mnemonic."""

QUEUES = {
    "load": "load",
    "preload": "execute",
    "matmul": "execute",
    "vector": "execute",
    "store": "store",
    "sync": "all",
    "host": "all",
    "halt": "all",
}
"""The queue that a listing prints before a mnemonic."""

ENTRY_FORMS: dict[str, tuple[str, Form]] = {
    ".window": ("windows", _form(".window", Window)),
    ".output": ("outputs", _form(".output", Output)),
    ".sum": ("sums", _form(".sum", Sum)),
    ".vector": ("vectors", _form(".vector", VectorSpec)),
    ".tensor": ("tensors", _form(".tensor", Tensor)),
    ".marker": ("markers", _form(".marker", Marker)),
    ".call": ("calls", _form(".call", HostCall, ("model",))),
}
"""By directive: the section that it adds an entry to, and its form. The bytes of a call's model follow its line."""
