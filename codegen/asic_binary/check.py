"""Runs an accelerator's model.so in a fresh process, the simulator as its driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from codegen.child_process import Child
from codegen.tvm_build import Binary
from codegen.tvm_check import run_in_child, runner

Array = NDArray[Any]


def simulator() -> Child:
    """A process for one :func:`run_library`: it imports the simulator while the library is still in the making."""
    return runner("codegen.asic_binary.check_child")


def run_library(
    binary: Binary,
    machine: str,
    options: Mapping[str, str],
    feeds: Sequence[Mapping[str, Array]],
    *,
    child: Child | None = None,
    timeout_s: float | None = None,
) -> tuple[list[list[Array]], list[int]]:
    """Outputs of the library for each set of inputs, and the accelerator's cycles of each run.

    ``machine`` and ``options`` are those of :func:`accel_sim.spec_file.load_spec`. VerificationError where the library
    cannot be loaded, crashes, or refuses the inputs. ``child``: a :func:`simulator` that was started before.
    """
    further = {"machine": machine, "options": dict(options)}
    outputs, answer = run_in_child(child or simulator(), binary, feeds, further, timeout_s)
    return outputs, answer["cycles"]
