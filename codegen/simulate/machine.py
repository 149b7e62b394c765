"""The machines of a simulation, as they are written on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accel_sim.program.machine_hash import spec_hash
from accel_sim.spec import MachineSpec, SpecError
from accel_sim.spec_file import DEFAULT_PRESET, load_spec, presets
from codegen.target import TARGETS, split_target
from passes.errors import InputError, UsageError


@dataclass(frozen=True)
class Machine:
    """``written`` as on the command line; ``source``: a preset's name or a TOML file; ``options`` change its keys."""

    written: str
    source: str
    options: Mapping[str, str]
    spec: MachineSpec

    @property
    def name(self) -> str:
        """As it was written, without the folder of a file: reports travel."""
        head, colon, tail = self.written.partition(":")
        return (Path(head).name if head.endswith(".toml") else head) + colon + tail

    def changed(self, changes: Mapping[str, str]) -> Machine:
        """The machine with more keys changed. Raises UsageError for keys and values that it cannot have."""
        options = {**self.options, **changes}
        try:
            spec = load_spec(self.source, options)
        except SpecError as error:
            raise UsageError(f"--sweep on {self.name}: {error}") from error
        head = self.written.partition(":")[0]
        written = ",".join(f"{key}={value}" for key, value in options.items())
        return Machine(f"{head}:{written}" if options else head, self.source, options, spec)


def parse_machine(text: str) -> Machine:
    """``asic``, a preset or a TOML file, with options. UsageError for what is none; InputError for a bad file."""
    head, options = split_target(text)
    if head == "asic":
        source = DEFAULT_PRESET
    elif head.endswith(".toml") or head in presets():
        source = head
    elif head in TARGETS.names():
        raise UsageError(f"--target {head!r} is no accelerator; {_known()}")
    else:
        raise UsageError(f"unknown target {head!r}; {_known()}")
    try:
        spec = load_spec(source)
    except SpecError as error:
        raise InputError(str(error)) from error
    try:
        return Machine(text, source, options, load_spec(source, options) if options else spec)
    except SpecError as error:
        raise UsageError(f"--target {text!r}: {error}") from error


def _known() -> str:
    return f"there are: asic, {', '.join(presets())}, or the path of a machine's .toml file"


def fitting_presets(machine_hash: bytes) -> list[str]:
    """Presets that a program of this hash is for."""
    return [name for name in presets() if spec_hash(load_spec(name)) == machine_hash]
