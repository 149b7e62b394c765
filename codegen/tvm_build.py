"""Compiles an ONNX file to a shared library, by TVM Relax, in a process of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codegen.child_process import Child, Failure
from codegen.cpu_device import generic_device
from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tvm_network import Kernel

_LIMIT_BYTES = 2**31 - 1
"""protobuf's limit; the network travels through it, and becomes constants of one library."""


@dataclass(frozen=True)
class UsedWorkload:
    """A layer's kernel in a network: ``count`` calls of it; ``schedule`` is what it was built with.

    ``tuned``: it is the one that was asked for; a default otherwise.
    """

    key: str
    count: int
    schedule: Schedule
    tuned: bool


@dataclass(frozen=True)
class Binary:
    """A compiled network. ``inputs`` and ``outputs``: names in the order of the entry point ``main``.

    ``bound``: the concrete shapes, where symbolic dimensions could not be kept; {} where they were. ``coarse``: values
    pass through 8-bit integers or 16-bit floats on their way. ``kernels``: the functions that the network calls, and
    ``workloads`` the layers among them; ``notes``: what was to be had and was not, a sentence each.
    """

    library: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bound: dict[str, tuple[int, ...]]
    coarse: bool = False
    workloads: tuple[UsedWorkload, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoBinary:
    """Why TVM has no binary for the network, naming the operator or node; ``log`` is what it wrote."""

    reason: str
    log: str = ""


def compiler() -> Child:
    """A process for one :func:`build`: it imports TVM while what is to be built is still in the making."""
    return Child("codegen.tvm_build_child")


def build(
    model: Path,
    library: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    device: Device | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    bind: bool = False,
    plan: str = "",
    child: Child | None = None,
    timeout_s: float | None = None,
) -> Binary | NoBinary:
    """Compiles ``model`` to ``library`` for ``device``, by default any processor of the host's architecture.

    ``schedules``: a workload's key -> what its kernel is built with; others take their defaults. Symbolic dimensions
    are kept if TVM can and not ``bind``; otherwise inputs are bound to ``shapes``, which holds a concrete shape for
    each of them. What does not work out is tried the other way. Kernels of symbolic shapes have no good schedules.
    ``plan``: the rank plan's hash, for the metadata. ``child``: a :func:`compiler` that was started before. Weights of
    more than 2 GiB are refused.
    """
    size = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    if size > _LIMIT_BYTES:
        return NoBinary(f"the network has {size / 2**30:.2f} GiB, TVM's importer takes up to 2 GiB")
    asked = dict(schedules or {})
    request = {
        "model": str(model.absolute()),
        "library": str(library.absolute()),
        "shapes": dict(shapes),
        "device": asdict(device or generic_device()),
        "schedules": {key: schedule.to_json() for key, schedule in asked.items()},
        "bind": bind,
        "plan": plan,
    }
    with child or compiler() as compiling:
        answer = compiling.call(request, timeout_s=timeout_s)
    if isinstance(answer, Failure):
        return NoBinary(f"TVM's compiler {answer.reason}", answer.log)
    if "reason" in answer:
        return NoBinary(answer["reason"])
    kernels = tuple(_kernel(value) for value in answer["kernels"])
    return Binary(
        library,
        tuple(answer["inputs"]),
        tuple(answer["outputs"]),
        {name: tuple(shape) for name, shape in answer["bound"].items()},
        answer["coarse"],
        _workloads(kernels, asked),
        kernels,
        tuple(answer["notes"]),
    )


def _kernel(value: Mapping[str, Any]) -> Kernel:
    arguments = tuple((tuple(shape), dtype) for shape, dtype in value["arguments"])
    return Kernel(value["name"], value["calls"], arguments, value["workload"], value["schedule"])


def _workloads(kernels: Sequence[Kernel], asked: Mapping[str, Schedule]) -> tuple[UsedWorkload, ...]:
    """The layers in the order of their first calls; one layer can stand in several kernels."""
    counts: Counter[tuple[str, str]] = Counter()
    for kernel in kernels:
        if kernel.workload:
            counts[kernel.workload, kernel.schedule] += kernel.calls
    used = ((key, Schedule.from_json(json.loads(text)), count) for (key, text), count in counts.items())
    return tuple(UsedWorkload(key, count, schedule, asked.get(key) == schedule) for key, schedule, count in used)
