"""Where training runs: the device, the number format that pays there, and the processes that share the work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from passes.errors import RankcError, UsageError, first_line

Tensor = torch.Tensor

TIMEOUT_S = 600.0
"""How long one process waits for the others, an evaluation on held-out samples included."""


@dataclass(frozen=True)
class Group:
    """The processes of one run: this one is ``rank`` of ``size``, on ``device``.

    What is exchanged raises RankcError where another process is gone or does not answer in time. In a group of one
    nothing is exchanged.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True in the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values``, in place, added up over all processes."""
        if self.size > 1:
            with _peers_answer():
                dist.all_reduce(values)
        return values

    def from_leader(self, values: Tensor) -> Tensor:
        """``values``, in place, as the leader has them."""
        if self.size > 1:
            with _peers_answer():
                dist.broadcast(values, 0)
        return values

    def bytes_from_leader(self, content: bytes) -> bytes:
        """The leader's ``content`` in every process; what others pass is ignored."""
        if self.size == 1:
            return content
        length = self.from_leader(torch.tensor([len(content)], device=self.device))
        buffer = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if self.leads and content:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return self.from_leader(buffer).cpu().numpy().tobytes()

    def state_from_leader(self, module: nn.Module) -> None:
        """Gives ``module`` the leader's parameters and buffers."""
        if self.size == 1:
            return
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                # a broadcast needs dense memory, in one order everywhere
                value.copy_(self.from_leader(value.detach().clone(memory_format=torch.contiguous_format)))

    def sum_gradients(self, parameters: Iterable[nn.Parameter], extra: Tensor) -> Tensor:
        """Adds gradients up over all processes, in place, and ``extra`` (n,) with them; returns its sum.

        One exchange for everything. A parameter that had a gradient somewhere has one everywhere afterwards.
        """
        if self.size == 1:
            return extra
        trained = [p for p in parameters if p.requires_grad]
        device, count = extra.device, len(trained)
        had = torch.tensor([float(p.grad is not None) for p in trained], device=device)
        parts = [torch.zeros(p.numel(), device=device) if p.grad is None else p.grad.reshape(-1) for p in trained]
        flat = self.sum(torch.cat([extra.float(), had, *(part.float() for part in parts)]))
        total, had, values = flat[: len(extra)], flat[len(extra) : len(extra) + count], flat[len(extra) + count :]
        start = 0
        for parameter, anywhere in zip(trained, had.tolist(), strict=True):
            part = values[start : start + parameter.numel()]
            start += parameter.numel()
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part.view(parameter.shape))
        return total


ALONE = Group(0, 1, torch.device("cpu"))


@contextmanager
def joined(device: str = "auto", timeout_s: float = TIMEOUT_S) -> Iterator[Group]:
    """The group that ``torchrun`` started this process in; a group of one without it.

    ``device``: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one. GPUs talk over NCCL,
    processors over gloo. UsageError for a device that is not there.
    """
    rank, size, local = (_environment(name, default) for name, default in _RUN)
    place = _device(device, local if size > 1 else 0)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield Group(0, 1, place)
        return
    with _peers_answer():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield Group(rank, size, place)
    finally:
        dist.destroy_process_group()


_RUN = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{name}={text!r} in the environment is no number; torchrun sets it")
    return int(text)


def _device(written: str, local: int) -> torch.device:
    if written == "auto":
        written = "cuda" if torch.cuda.is_available() else "cpu"
    if written == "cpu":
        return torch.device("cpu")
    kind, colon, number = written.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdigit())):
        raise UsageError(f"--device {written!r}: there are auto, cpu, cuda and cuda:N")
    index, there = int(number) if colon else local, torch.cuda.device_count()
    if index >= there:
        raise UsageError(f"--device {written}: GPU {index} is wanted, this machine has {there or 'none'}")
    return torch.device("cuda", index)


@contextmanager
def _peers_answer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = first_line(error)
        raise RankcError(
            f"another process of this run is gone, or did not answer in time; its own error says why ({first[:200]})"
        ) from error


def multiplies_bf16(device: torch.device) -> bool:
    """True where products of bfloat16 run in hardware and twice as fast as float32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_room(size_bytes: int, device: torch.device) -> bool:
    """True where data of this size may stay on the device for the whole run: half of what is free is left."""
    if device.type != "cuda":
        return True
    return size_bytes <= torch.cuda.mem_get_info(device)[0] // 2
