"""The target ``asic``: a machine of :mod:`accel_sim`, priced in cycles; its programs run on the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from accel_sim.spec import SpecError
from accel_sim.spec_file import DEFAULT_PRESET, load_spec
from codegen.asic_emission import AsicEmitter
from codegen.asic_latency import AsicLatency
from codegen.report.build import tool_versions
from codegen.target import Target
from codegen.tvm_versions import check_tvm
from passes.errors import InputError, UsageError


class AsicTarget:
    """Makes targets of ``machine``: the name of one that comes with rankc, or the path of a TOML file."""

    name = "asic"

    def __init__(self, machine: str = DEFAULT_PRESET) -> None:
        self.machine = machine

    def make(self, written: str, options: Mapping[str, str]) -> Target:
        check_tvm()
        try:
            spec = load_spec(self.machine)
        except SpecError as error:
            raise InputError(str(error)) from error
        try:
            if options:
                spec = load_spec(self.machine, options)
        except SpecError as error:
            raise UsageError(f"--target {written!r}: {error}") from error
        prices = AsicLatency(spec)
        emitter = AsicEmitter(spec, self.machine, options, prices)
        return Target(
            name=_short(written),
            spec=asdict(spec),
            latency=prices,
            emit=emitter,
            clock_hz=spec.clock_mhz * 1e6,
            versions=tool_versions(),
            baseline=emitter.baseline,
            get_ready=emitter.get_ready,
            close=emitter.close,
        )


def _short(written: str) -> str:
    """Without the folder of a machine's file: reports travel."""
    head, colon, tail = written.partition(":")
    return (Path(head).name if head.endswith(".toml") else head) + colon + tail
