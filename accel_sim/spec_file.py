"""Reads a machine description from TOML, checks it against the dataclasses of :mod:`accel_sim.spec`, applies overrides.

Every complaint is a :class:`SpecError` of one line that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from accel_sim.spec import MachineSpec, SpecError

DEFAULT_PRESET = "edge_16x16"
"""What ``--target asic`` means."""

_TARGETS = "targets"
_LARGEST_INTEGER = 1 << 63
_SRAM = "sram_kib"


def presets() -> tuple[str, ...]:
    """Names of the machines that come with the package, sorted."""
    folder = resources.files("accel_sim") / _TARGETS
    return tuple(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_spec(name_or_path: str | Path = DEFAULT_PRESET, overrides: Mapping[str, str] | None = None) -> MachineSpec:
    """A machine by preset name or by the path of a TOML file, with ``overrides`` applied.

    An override's key is a section's key (``rows``), or ``section.key`` where two sections share it; ``sram_kib``
    sets input and weight scratchpad together, half each. Raises :class:`SpecError`.
    """
    text, where = _read(name_or_path)
    table = _parse(text, where)
    for key, value in (overrides or {}).items():
        _override(table, key, value)
    spec: MachineSpec = _build(MachineSpec, table, where, "")
    _check_dataflows(spec, where)
    return spec


def _read(name_or_path: str | Path) -> tuple[str, str]:
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith(".toml"):
        try:
            return Path(name).read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{name}: cannot be read as a machine description: {error}") from error
    if name not in presets():
        raise SpecError(f"no machine is called {name!r}: give one of {', '.join(presets())}, or a path ending in .toml")
    source = resources.files("accel_sim") / _TARGETS / f"{name}.toml"
    return source.read_text(encoding="utf-8"), f"{name}.toml"


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise SpecError(f"{where}: brackets or keys are nested too deep") from error
    except ValueError as error:  # also of a number with more digits than Python reads
        # The parser gives the line, not the key: a person looks for the key.
        at = re.search(r"line (\d+)", str(error))
        line = text.splitlines()[int(at.group(1)) - 1].strip() if at else ""
        raise SpecError(f"{where}: {error}: {line!r}") from error


def _check_dataflows(spec: MachineSpec, where: str) -> None:
    flows = spec.array.dataflows
    if "rs" in flows and len(flows) > 1:
        raise SpecError(f"{where}: array.dataflows is {list(flows)!r}: a row-stationary array has no other data flow")
    if ("rs" in flows) != (spec.row_stationary is not None):
        raise SpecError(f'{where}: the section [row_stationary] belongs to array.dataflows = ["rs"], and to no other')


def _section(hint: Any) -> Any:
    """The dataclass of a section's type, optional or not; None for the type of a key."""
    return next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def _build(cls: type[Any], table: Mapping[str, Any], where: str, section: str) -> Any:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise SpecError(f"{where}: unknown key {section}{key}; known here: {', '.join(fields)}")
    values = {}
    for name, spec_field in fields.items():
        key = section + name
        if name not in table:
            if spec_field.default is None:
                continue
            raise SpecError(f"{where}: key {key} is missing")
        if section_class := _section(hints[name]):
            if not isinstance(table[name], dict):
                raise SpecError(f"{where}: {key} must be a section [{key}]")
            values[name] = _build(section_class, table[name], where, f"{key}.")
        else:
            values[name] = _checked(table[name], hints[name], spec_field.metadata, f"{where}: {key}")
    return cls(**values)


def _checked(value: Any, kind: Any, metadata: Mapping[str, Any], what: str) -> Any:
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
            raise SpecError(f"{what} must be a list of strings that is not empty, not {value!r}")
        if wrong := [entry for entry in value if entry not in metadata["choices"]]:
            raise SpecError(f"{what} holds {wrong[0]!r}; allowed are {', '.join(metadata['choices'])}")
        if len(set(value)) != len(value):
            raise SpecError(f"{what} names one entry twice: {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > _LARGEST_INTEGER:
            raise SpecError(f"{what} is larger than any number here")
        value = float(value)
    if type(value) is not kind:
        raise SpecError(f"{what} must be {_ARTICLE[kind]}, not {value!r}")
    if "choices" in metadata and value not in metadata["choices"]:
        raise SpecError(f"{what} is {value!r}; allowed are {', '.join(map(str, metadata['choices']))}")
    if "min" in metadata and not metadata["min"] <= value <= metadata["max"]:  # also refuses NaN
        raise SpecError(f"{what} is {value!r}; allowed is {metadata['min']:g} to {metadata['max']:g}")
    if kind is str and not value.strip():
        raise SpecError(f"{what} is empty")
    return value


_ARTICLE = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _override(table: dict[str, Any], key: str, text: str) -> None:
    if key == _SRAM:
        total = _value(int, text, key)
        if total < 2:
            raise SpecError(f"override {key}={text}: must be at least 2, half of it for inputs and half for weights")
        pads = table.setdefault("scratchpads", {})
        pads["weight_kib"] = total // 2
        pads["input_kib"] = total - total // 2
        return
    known = _leaves()
    found = [(section, name) for section, name in known if key in (name, f"{section}.{name}")]
    if not found:
        names = sorted({name for _, name in known} | {_SRAM})
        raise SpecError(f"override {key}={text}: no such key; known are {', '.join(names)}")
    if len(found) > 1:
        raise SpecError(f"override {key}={text}: write {' or '.join(f'{s}.{n}' for s, n in found)}")
    section, name = found[0]
    inner = table.setdefault(section, {}) if section else table
    inner[name] = _value(known[found[0]], text, key)


def _leaves() -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, kind in get_type_hints(MachineSpec).items():
        if section_class := _section(kind):
            found |= {(name, inner): k for inner, k in get_type_hints(section_class).items()}
        else:
            found["", name] = kind
    return found


def _value(kind: Any, text: str, key: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind == tuple[str, ...]:
            return text.split("+")
        return kind(text)
    except (ValueError, KeyError) as error:
        expected = "entries joined by +" if kind == tuple[str, ...] else _ARTICLE[kind]
        raise SpecError(f"override {key}={text}: expected {expected}") from error
