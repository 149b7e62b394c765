import json
import platform
import sys
from pathlib import Path

import pytest

import codegen.cpu_device as cpu_device
from codegen.cpu_device import device_for, generic_device, host_device, runs_here
from passes.errors import UsageError

on_x86 = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="needs /proc/cpuinfo of an x86 processor"
)


def flags() -> set[str]:
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return set(line.partition(":")[2].split())


@on_x86
def test_the_host_has_what_its_kernel_lists() -> None:
    device = host_device()
    has = flags()
    expected = (512, 32) if "avx512f" in has else (256, 16) if "avx" in has else (128, 16)
    assert (device.vector_bits, device.vector_registers) == expected
    assert device.target["kind"] == "llvm" and device.target["mcpu"] and device.target["num-cores"] == 1
    assert device.threads == 1 and runs_here(device)
    json.dumps(device.target)  # the key in the database
    assert device.key == host_device().key


@on_x86
def test_what_a_hypervisor_hides_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A server's processor in a guest that was started without AVX-512, as its kernel describes it.
    probe = cpu_device.Probe("znver4", "x86_64-pc-linux-gnu", frozenset({"avx", "avx2", "avx512f", "fma"}), (), ())
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "model name\t: Some Processor\ncpu family\t: 25\nmodel\t\t: 17\nflags\t\t: fpu sse2 avx avx2 fma\n"
    )
    asked = []

    def answers(triple: str, cpu: str, attributes: tuple[str, ...]) -> cpu_device.Probe:
        asked.append((triple, cpu, attributes))
        left = probe.features - {name[1:] for name in attributes}
        return cpu_device.Probe(probe.cpu, probe.triple, left, ("znver4",), ())

    monkeypatch.setattr(cpu_device, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(cpu_device, "_probe", answers)
    monkeypatch.setattr(cpu_device, "host_model", cpu_device.host_model.__wrapped__)
    device = host_device()
    assert device.target == {"kind": "llvm", "mcpu": "znver4", "mattr": ["-avx512f"], "num-cores": 1}
    assert (device.vector_bits, device.vector_registers) == (256, 16)
    assert device.model == "Some Processor (family 25, model 17)"
    assert asked == [("", "host", ()), ("", "znver4", ("-avx512f",))]


@pytest.mark.parametrize(
    ("options", "vectors"),
    [
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"}, (512, 32)),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}, (256, 16)),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "nehalem"}, (128, 16)),
        ({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, (128, 32)),
        ({"mtriple": "armv7-linux-gnueabihf", "mcpu": "cortex-a9"}, (128, 16)),
        ({"mtriple": "riscv64-linux-gnu", "mcpu": "sifive-x280"}, (512, 32)),
        ({"mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64"}, (128, 8)),  # 32 registers of one value
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512", "mattr": "-avx512f:+sse4a"}, (256, 16)),
    ],
)  # lengths and counts of the vendors' manuals
def test_the_vectors_of_known_processors(options: dict[str, str], vectors: tuple[int, int]) -> None:
    device = device_for({**options, "threads": "4"})
    assert (device.vector_bits, device.vector_registers) == vectors
    assert device.target["mtriple"] == options["mtriple"] and device.target["num-cores"] == 4
    assert options["mcpu"] in device.model
    if "mattr" in options:
        assert device.target["mattr"] == ["-avx512f", "+sse4a"]


@on_x86
def test_what_runs_here() -> None:
    assert not runs_here(device_for({"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}))
    generic = generic_device()
    assert runs_here(generic)
    assert "mcpu" not in generic.target and generic.vector_bits == 128  # SSE2, which every x86-64 has
    assert generic.model == "any x86_64"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mcp": "x"}, "a CPU target has no option 'mcp', is it mcpu?"),
        ({"threads": "0"}, "threads=0: expected a number of 1 or more"),
        ({"threads": "9999"}, r"threads=9999: this process may use \d+ processors"),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "znver44"}, "mcpu=znver44: LLVM knows no such x86_64 .*znver4"),
        ({"mtriple": "nowhere-linux-gnu"}, "mtriple=nowhere-linux-gnu: LLVM knows no such architecture"),
        ({"mattr": "avx2"}, r"mattr=avx2: 'avx2' is not \+NAME or -NAME; several are written \+A:-B"),
        ({"mtriple": "x86_64-linux-gnu", "mattr": "+neon"}, r"mattr: \+neon: no feature of x86_64"),
    ],
)
def test_options_that_are_none(options: dict[str, str], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        device_for(options)
