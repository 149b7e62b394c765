"""A GPU that is none: TVM's CUDA runtime on a driver that runs model.cu, compiled as C++, on the host.

What is not seen by it: the PTX (ptxas reads that), races between threads, and time.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent

_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\)(?= \{)', re.MULTILINE)


def build_driver(folder: Path) -> None:
    """Writes libcuda.so.1 and libcudart.so.13 to ``folder``, which then goes on LD_LIBRARY_PATH."""
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: cuda*; };\n")
    for name, script in (("libcuda.so.1", ()), ("libcudart.so.13", (f"-Wl,--version-script={versions}",))):
        source, output = HERE / "emulated_driver.cc", folder / name
        command = ["g++", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}", *script, str(source), "-o", str(output)]
        subprocess.run([*command, "-ldl"], check=True)


def build_kernels(source: Path, ptx: Path, folder: Path) -> int:
    """Compiles the kernels of a model.cu for the module that has the text of ``ptx``; returns how many there are."""
    text = source.read_text(encoding="utf-8")
    kernels = _KERNEL.findall(text)
    lines = []
    for name, parameters in kernels:
        types = [re.sub(r"\s*\b\w+$", "", p.replace("__restrict__", "")).strip() for p in parameters.split(",")]
        arguments = ", ".join(f"*static_cast<std::remove_const_t<{t}>*>(p[{i}])" for i, t in enumerate(types))
        lines.append(f"static void run_{name}(void** p) {{ {name}({arguments}); }}")
    table = "\n".join(f'  if (!std::strcmp(name, "{name}")) emulated::body = run_{name};' for name, _ in kernels)
    lines.append(
        'extern "C" int emulated_launch(const char* name, const unsigned* grid, const unsigned* block, void** p) {\n'
        "  emulated::body = nullptr;\n" + table + "\n  if (emulated::body == nullptr) return 500;\n"
        "  if (grid == nullptr) return 0;\n"
        "  emulated::arguments = p;\n"
        "  gridDim = {grid[0], grid[1], grid[2]};\n  blockDim = {block[0], block[1], block[2]};\n"
        "  for (unsigned z = 0; z < grid[2]; ++z) for (unsigned y = 0; y < grid[1]; ++y)\n"
        "    for (unsigned x = 0; x < grid[0]; ++x) { blockIdx = {x, y, z}; emulated::run_block(); }\n"
        "  return 0;\n}"
    )
    unit = folder / f"{source.stem}.cc"
    code = re.sub(r"^\s*#include <cuda/std/\w+>$|^\s*namespace std \{.*?^  \}$", "", text, flags=re.M | re.S)
    code = re.sub(r"__shared__( alignas\(\d+\))?", r"\1 static", code)
    unit.write_text(f'#include "{HERE / "emulated_kernels.h"}"\n{code}\n' + "\n".join(lines) + "\n")
    output = folder / f"{fnv(ptx.read_bytes()):016x}.so"
    command = ["g++", "-std=c++17", "-O1", "-w", "-fmax-errors=3", "-shared", "-fPIC", str(unit), "-o", str(output)]
    subprocess.run(command, check=True)
    return len(kernels)


def fnv(data: bytes) -> int:
    """FNV-1a, as the driver names modules."""
    found = 14695981039346656037
    for byte in data:
        found = (found ^ byte) * 1099511628211 % 2**64
    return found
