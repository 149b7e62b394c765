"""Compiles an ONNX file to a shared library for this host, by TVM Relax, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from codegen.child_process import Failure, call

_LIMIT_BYTES = 2**31 - 1
"""protobuf's limit; the network travels through it, and becomes constants of one library."""


@dataclass(frozen=True)
class Binary:
    """A compiled network. ``inputs`` and ``outputs``: names in the order of the entry point ``main``.

    ``bound``: the concrete shapes, where symbolic dimensions could not be kept; {} where they were. ``coarse``: values
    pass through 8-bit integers or 16-bit floats on their way.
    """

    library: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bound: dict[str, tuple[int, ...]]
    coarse: bool = False


@dataclass(frozen=True)
class NoBinary:
    """Why TVM has no binary for the network, naming the operator or node; ``log`` is what it wrote."""

    reason: str
    log: str = ""


def build(
    model: Path, library: Path, shapes: Mapping[str, tuple[int, ...]], *, timeout_s: float | None = None
) -> Binary | NoBinary:
    """Compiles ``model`` to ``library`` for any processor of the host's architecture.

    Symbolic dimensions are kept if TVM can; otherwise inputs are bound to ``shapes``, which holds a concrete shape for
    each of them. Weights of more than 2 GiB are refused.
    """
    size = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    if size > _LIMIT_BYTES:
        return NoBinary(f"the network has {size / 2**30:.2f} GiB, TVM's importer takes up to 2 GiB")
    request = {"model": str(model.absolute()), "library": str(library.absolute()), "shapes": dict(shapes)}
    answer = call("codegen.tvm_build_child", request, timeout_s=timeout_s)
    if isinstance(answer, Failure):
        return NoBinary(f"TVM's compiler {answer.reason}", answer.log)
    if "reason" in answer:
        return NoBinary(answer["reason"])
    return Binary(
        library,
        tuple(answer["inputs"]),
        tuple(answer["outputs"]),
        {name: tuple(shape) for name, shape in answer["bound"].items()},
        answer["coarse"],
    )
