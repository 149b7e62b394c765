"""GPUs by name: what their makers publish of them, and nothing that was measured here.

Peaks are NVIDIA's data sheets': float32 outside the tensor cores at boost clock, memory bandwidth of the part named.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from codegen.tune.device import Device
from passes.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """``arch``: compute capability as compilers write it. ``flops``: float32 operations per second, a multiply-add two.

    ``bytes_per_s``: of its memory. ``multiprocessors``: units that run blocks of threads.
    """

    name: str
    arch: str
    flops: float
    bytes_per_s: float
    multiprocessors: int

    @property
    def target(self) -> dict[str, object]:
        """TVM's target: what every architecture from sm_70 on offers a block."""
        return {
            "kind": "cuda",
            "arch": self.arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 48 * 1024,
            "thread_warp_size": 32,
        }

    def device(self) -> Device:
        """The device under which trials of this GPU are kept; a warp is its vector."""
        return Device(self.target, f"NVIDIA {self.name}", 1, 32 * 32, 255)


GPUS: Mapping[str, Gpu] = {
    key: Gpu(name, arch, tflops * 1e12, gbytes * 1e9, units)
    for key, name, arch, tflops, gbytes, units in (
        ("v100", "V100 SXM2", "sm_70", 15.7, 900, 80),
        ("t4", "T4", "sm_75", 8.1, 320, 40),
        ("a100", "A100 SXM4 80GB", "sm_80", 19.5, 2039, 108),
        ("a10", "A10", "sm_86", 31.2, 600, 72),
        ("rtx3090", "GeForce RTX 3090", "sm_86", 35.6, 936, 82),
        ("orin", "Jetson AGX Orin 64GB", "sm_87", 5.3, 204.8, 16),
        ("l4", "L4", "sm_89", 30.3, 300, 58),
        ("l40s", "L40S", "sm_89", 91.6, 864, 142),
        ("rtx4090", "GeForce RTX 4090", "sm_89", 82.6, 1008, 128),
        ("h100", "H100 SXM5", "sm_90", 66.9, 3350, 132),
        ("h200", "H200 SXM", "sm_90", 66.9, 4800, 132),
        ("b200", "B200", "sm_100", 75.0, 8000, 148),
    )
}

DEFAULT = "a100"
OPTIONS = ("gpu", "arch")


def gpu_for(options: Mapping[str, str]) -> Gpu:
    """The GPU of ``gpu=NAME``, or the first of the table with ``arch=sm_NN``; an A100 without either. UsageError."""
    for option in options:
        if option not in OPTIONS:
            raise UsageError(f"a CUDA target has no option {option!r}: {', '.join(OPTIONS)}")
    arch = options.get("arch")
    if arch is not None and not re.fullmatch(r"sm_\d{2,3}a?", arch):
        raise UsageError(f"arch={arch}: an architecture is written sm_80")
    archs = list(dict.fromkeys(gpu.arch for gpu in GPUS.values()))
    if "gpu" in options:
        key = options["gpu"].lower()
        if key not in GPUS:
            near = difflib.get_close_matches(key, GPUS, 3) or list(GPUS)
            raise UsageError(f"gpu={options['gpu']}: no such GPU is known; there are {', '.join(near)}")
        if arch is not None and arch != GPUS[key].arch:
            raise UsageError(f"gpu={key} has arch={GPUS[key].arch}, not {arch}: give one of both")
        return GPUS[key]
    if arch is None:
        return GPUS[DEFAULT]
    for gpu in GPUS.values():
        if gpu.arch == arch:
            return gpu
    raise UsageError(f"arch={arch}: no GPU of that architecture is known; there are {', '.join(archs)}")
