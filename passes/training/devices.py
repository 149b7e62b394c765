"""Where training runs: the device, the number format that pays there, and the processes that share the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """The processes of one run: this one is ``rank`` of ``size``, on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True in the process that writes files and speaks."""
        return self.rank == 0


ALONE = Group(0, 1, torch.device("cpu"))


@contextmanager
def joined(device: str = "auto") -> Iterator[Group]:
    """The group that ``torchrun`` started this process in; a group of one without it.

    ``device``: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one. GPUs talk over NCCL,
    processors over gloo.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
    if size == 1:
        yield Group(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Group(rank, size, place)
    finally:
        dist.destroy_process_group()


def multiplies_bf16(device: torch.device) -> bool:
    """True where products of bfloat16 run in hardware and twice as fast as float32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
