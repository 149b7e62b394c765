"""Processors as devices: the host with everything that it has, or another one as options describe it.

LLVM names the host's processor and lists what a processor of that name has; ``/proc/cpuinfo`` says what this one has,
which is less where a hypervisor or the kernel hides a part of it.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from codegen.child_process import Failure, call
from codegen.tune.device import Device
from passes.errors import UsageError

OPTIONS = ("mcpu", "mtriple", "mattr", "threads")
"""What a CPU target's options may be; ``mattr`` as ``+name:-name``."""

_CPUINFO = Path("/proc/cpuinfo")

_KERNEL_FLAGS = {
    "x86_64": {
        name: name
        for name in (
            *("avx", "avx2", "fma", "f16c", "bmi2", "movbe", "popcnt", "adx", "aes", "vaes", "vpclmulqdq", "gfni"),
            *("avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl", "avx512ifma", "avx512vbmi"),
        )
    }
    | {
        **{"sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sse4a": "sse4a"},
        **{"bmi": "bmi1", "lzcnt": "abm", "pclmul": "pclmulqdq", "rdrnd": "rdrand", "sha": "sha_ni"},
        **{"avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"},
        **{"avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq", "avx512fp16": "avx512_fp16"},
        **{"avxvnni": "avx_vnni", "amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16"},
        **{"avx512vp2intersect": "avx512_vp2intersect", "fma4": "fma4", "xop": "xop", "tbm": "tbm"},
    },
    "aarch64": {
        **{"neon": "asimd", "dotprod": "asimddp", "fullfp16": "asimdhp", "lse": "atomics", "crc": "crc32"},
        **{"i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2", "sme": "sme", "rdm": "asimdrdm"},
        **{"sha2": "sha2", "sha3": "sha3", "aes": "aes", "rcpc": "lrcpc", "jsconv": "jscvt", "complxnum": "fcma"},
    },
}
"""What a compiler may use -> the flag in /proc/cpuinfo without which it must not."""


_SCALAR = 128, 8
"""32 registers of one value each: LLVM takes a vector of four values apart, and eight of those fill them."""


@dataclass(frozen=True)
class Probe:
    """What LLVM says of a processor: its name, the triple, what it has, and the names that would have been known."""

    cpu: str
    triple: str
    features: frozenset[str]
    processors: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return self.triple.split("-")[0]


def host_device(threads: int = 1) -> Device:
    """This host, with every instruction that it has. Raises UsageError for a number of threads that it lacks."""
    return device_for({"threads": str(threads)})


def generic_device(threads: int = 1) -> Device:
    """Any processor of the host's architecture: what runs elsewhere too, with its oldest instructions."""
    probe = _known("", "", ())
    return Device({"kind": "llvm", "num-cores": threads}, f"any {probe.architecture}", threads, *_vectors(probe))


def device_for(options: Mapping[str, str]) -> Device:
    """The processor that ``options`` describe: ``mcpu``, ``mtriple``, ``mattr`` (``+name:-name``), ``threads``.

    Without ``mtriple`` it is the host, without ``mcpu`` too with everything that it has. Raises UsageError for an
    option, a processor, a triple or a feature that does not exist, naming those that are near.
    """
    for name in options:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, 1)
            raise UsageError(
                f"a CPU target has no option {name!r}" + (f", is it {near[0]}?" if near else f": {', '.join(OPTIONS)}")
            )
    triple, cpu = options.get("mtriple", ""), options.get("mcpu", "")
    threads = _threads(options.get("threads", "1"), here=not triple)
    attributes = _attributes(options.get("mattr", ""))
    host = not triple and not cpu
    probe = _known(triple, "host" if host else cpu, attributes)
    if host:
        hidden = tuple(f"-{name}" for name in _hidden(probe))
        attributes = tuple(dict.fromkeys((*hidden, *attributes)))
        probe = _known(triple, probe.cpu, attributes)
    target: dict[str, object] = {"kind": "llvm"}
    if triple:
        target["mtriple"] = triple
    if probe.cpu:
        target["mcpu"] = probe.cpu
    if attributes:
        target["mattr"] = list(attributes)
    target["num-cores"] = threads
    model = f"{probe.cpu or 'any'} ({probe.architecture})" if triple else host_model()
    return Device(target, model, threads, *_vectors(probe))


def runs_here(device: Device) -> bool:
    """True where this host has every instruction that code for ``device`` may use."""
    target = device.target
    if target.get("kind") != "llvm":
        return False
    wanted = _probe(str(target.get("mtriple", "")), str(target.get("mcpu", "")), tuple(target.get("mattr", ())))
    host = _probe("", "host", ())
    if isinstance(wanted, str) or isinstance(host, str):
        return False
    names = set(_KERNEL_FLAGS.get(host.architecture, {}))
    have = host.features - set(_hidden(host))
    return _same(wanted.architecture, host.architecture) and wanted.features & names <= have & names


@lru_cache(maxsize=1)
def host_model() -> str:
    """The processor's own name, such as ``AMD EPYC (family 25, model 17)``."""
    found = _cpuinfo()
    name = found.get("model name") or found.get("Model") or platform.processor() or platform.machine()
    details = [f"{label} {found[key]}" for label, key in (("family", "cpu family"), ("model", "model")) if key in found]
    if "CPU implementer" in found:
        details = [f"implementer {found['CPU implementer']}", f"part {found.get('CPU part', '?')}"]
    return f"{name} ({', '.join(details)})" if details else name


def _threads(written: str, *, here: bool) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", written):
        raise UsageError(f"threads={written}: expected a number of 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if here and int(written) > cores:
        raise UsageError(f"threads={written}: this process may use {cores} processors")
    return int(written)


def _attributes(written: str) -> tuple[str, ...]:
    names = tuple(name for name in re.split(r"[:;\s]+", written) if name)
    for name in names:
        if not re.fullmatch(r"[+-][A-Za-z0-9_.-]+", name):
            raise UsageError(f"mattr={written}: {name!r} is not +NAME or -NAME; several are written +A:-B")
    return names


def _known(triple: str, cpu: str, attributes: tuple[str, ...]) -> Probe:
    """The probe of what may be misspelt."""
    probe = _probe(triple, cpu, attributes)
    if isinstance(probe, str):
        raise UsageError(f"mtriple={triple}: {probe}" if triple else f"TVM's LLVM {probe}")
    if cpu not in ("", "host", *probe.processors):
        near = difflib.get_close_matches(cpu, probe.processors, 3, 0.5) or probe.processors[:8]
        raise UsageError(f"mcpu={cpu}: LLVM knows no such {probe.architecture} processor; there are {', '.join(near)}")
    if probe.unknown:
        raise UsageError(f"mattr: {', '.join(probe.unknown)}: no feature of {probe.architecture}")
    return probe


@lru_cache(maxsize=64)
def _probe(triple: str, cpu: str, attributes: tuple[str, ...]) -> Probe | str:
    """What LLVM says, or why it says nothing; ``cpu``: its name, "host", or empty for the architecture's oldest."""
    answer = call("codegen.cpu_device_child", {"mtriple": triple, "mcpu": cpu, "mattr": list(attributes)})
    if isinstance(answer, Failure):
        # An architecture that it does not know is a null pointer to it.
        return "LLVM knows no such architecture" if "SIGSEGV" in answer.reason and triple else answer.reason
    return Probe(
        answer["cpu"],
        answer["triple"],
        frozenset(answer["features"]),
        tuple(answer["processors"]),
        tuple(answer["unknown"]),
    )


def _hidden(probe: Probe) -> list[str]:
    """What the processor's name promises and this host does not have."""
    found = _cpuinfo()
    flags = set((found.get("flags") or found.get("Features") or "").split())
    table = _KERNEL_FLAGS.get(probe.architecture, {})
    return sorted(name for name, flag in table.items() if flags and name in probe.features and flag not in flags)


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries; {} where the system has no such file."""
    if not _CPUINFO.is_file():
        return {}
    first = _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _vectors(probe: Probe) -> tuple[int, int]:
    """Bits of a vector and how many of them there are."""
    has, architecture = probe.features, probe.architecture
    if architecture in ("x86_64", "amd64"):
        if "avx512f" in has:
            return 512, 32
        return (256, 16) if "avx" in has else (128, 16)
    if re.fullmatch(r"i[3-6]86", architecture):
        return (256, 8) if "avx" in has else (128, 8)
    if architecture.startswith(("aarch64", "arm64")):
        return 128, 32  # SVE's vectors have no length that is known here
    if architecture.startswith(("arm", "thumb")):
        return (128, 16) if "neon" in has else _SCALAR
    if architecture.startswith("riscv"):
        lengths = [int(name[3:-1]) for name in has if re.fullmatch(r"zvl\d+b", name)]
        return (max(lengths), 32) if "v" in has and lengths else _SCALAR
    return 128, 16


def _same(first: str, second: str) -> bool:
    names: Sequence[set[str]] = ({"x86_64", "amd64"}, {"aarch64", "arm64"})
    return first == second or any({first, second} <= group for group in names)
