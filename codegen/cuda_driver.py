"""Which GPU this machine has, asked of NVIDIA's driver itself: TVM and CUDA's toolkit are not needed for it."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class FoundGpu:
    """A GPU of this machine: its name, and its compute capability as compilers write it (``sm_80``)."""

    name: str
    arch: str

    def runs(self, arch: str) -> bool:
        """True if PTX for ``arch`` runs on it: the driver compiles PTX of older architectures."""
        return _number(arch) <= _number(self.arch)


def find_gpu() -> FoundGpu | str:
    """The first GPU; or why there is none, as half a sentence."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no driver of NVIDIA (libcuda.so.1)"
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return "a driver of NVIDIA that finds no GPU"
    name = ctypes.create_string_buffer(256)
    capability = []
    failed = driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device)
    for attribute in (_MAJOR, _MINOR):
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    if failed:
        return f"a driver of NVIDIA that fails with error {failed}"
    return FoundGpu(name.value.decode(errors="replace"), f"sm_{capability[0]}{capability[1]}")


def _number(arch: str) -> int:
    found = re.search(r"\d+", arch)
    return int(found[0]) if found else 0
