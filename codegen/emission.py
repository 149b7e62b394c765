"""From the written model.onnx to the files that are deployed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.child_process import Child
from codegen.dataset import Dataset, random_inputs
from codegen.events import Events
from codegen.report.build import BinaryCheck
from codegen.report.measurement import MeasurementReport
from codegen.report.program import ProgramReport
from codegen.tune.statistics import Ratio, summary
from codegen.tvm_build import Binary, NoBinary, build
from codegen.tvm_check import Difference, check_binary
from passes.core.cost import Cost, Kind
from passes.errors import VerificationError
from passes.graph import TensorSpec

Feeds = Mapping[str, NDArray[Any]]

LIBRARY = "model.so"

RELATIVE_L2 = 1e-3
"""float32 in another order of summation: a network of 100 layers stays below 1e-5; a wrong operator does not."""

COARSE_RELATIVE_L2 = 5e-2
"""Where values pass through int8 or float16: a sum that lies on a rounding step may fall to either side."""

MAX_ABS = 1e-5
"""For outputs that are almost 0, of which a relative error says nothing."""


@dataclass(frozen=True, eq=False)
class EmissionRequest:
    """What an emitter is asked for.

    ``model``: the rewritten network in the output folder ``folder``, where everything goes; ``original``: the user's.
    ``shapes``: a concrete shape per input, used where symbolic dimensions cannot be kept. ``samples``: single
    inferences to check with. ``calibration``: data as the network meets it, random inputs unless ``calibrated``;
    ``evaluation``: data with labels, if there are any. ``baseline``: what the target's ``baseline`` said. ``plan``:
    what the rank plan is known by (:func:`codegen.results.plan_sha256`), empty where the network is the input.
    ``draft``: the network's numbers are going to change, and these files with them: what tells the cost is enough.
    """

    model: Path
    folder: Path
    original: Path
    shapes: Mapping[str, tuple[int, ...]]
    samples: Sequence[Feeds]
    calibration: Dataset
    calibrated: bool
    evaluation: Dataset | None
    seed: int
    events: Events
    baseline: Cost | None = None
    plan: str = ""
    draft: bool = False


@dataclass(frozen=True)
class Emission:
    """What an emitter made.

    ``artifacts``: kind -> file name in the output folder, None where it could not be made. ``cost``: what the emitted
    files cost on the target, where that is known from themselves and not from the price list; ``baseline``: what the
    files of the network as it came cost, measured beside them, and ``comparison`` their latencies' ratio. ``program``:
    what is to be said of an accelerator's program, ``measurement`` of a binary that was timed.
    """

    artifacts: dict[str, str | None] = field(default_factory=dict)
    check: BinaryCheck | None = None
    cost: Cost | None = None
    program: ProgramReport | None = None
    baseline: Cost | None = None
    comparison: Ratio | None = None
    measurement: MeasurementReport | None = None


def as_emitted(priced: Cost, emitted: Cost | None) -> Cost:
    """The price of a network with latency, energy and traffic as its emitted files tell them."""
    if emitted is None:
        return priced
    return replace(
        priced,
        latency=emitted.latency,
        energy_pj=emitted.energy_pj,
        dram_bytes=emitted.dram_bytes,
        kind=emitted.kind,
    )


def checked(binary: Binary, found: Difference, library: str = LIBRARY) -> BinaryCheck:
    """What is reported of ``found``, how far the outputs of ``binary`` are from those of model.onnx in onnxruntime.

    VerificationError, which calls it ``library``, where that is more than another order of summation explains.
    """
    limit = COARSE_RELATIVE_L2 if binary.coarse else RELATIVE_L2
    if not found.within(limit, MAX_ABS):
        raise VerificationError(
            f"{library} differs from model.onnx in onnxruntime by {found.relative_l2:.2g} (relative L2), "
            f"at most {limit:g} was expected"
        )
    return BinaryCheck(found.relative_l2, found.max_abs, found.samples, dict(binary.bound))


def measured(seconds: NDArray[np.float64]) -> Cost:
    """The latency of what took ``seconds`` in single calls."""
    return Cost(latency=summary(seconds.ravel().tolist()).seconds, unit="s", kind=Kind.MEASURED)


def emit_host_library(request: EmissionRequest, library: str = LIBRARY, child: Child | None = None) -> Emission:
    """Compiles the model to ``library`` for the host, runs it in a fresh process and compares it with onnxruntime.

    ``child``: a :func:`codegen.tvm_build.compiler` that was started before.

    A library that cannot be built or loaded, or does not compute what onnxruntime does, is not left behind: a warning
    says why, and model.onnx stands without it.
    """
    events = request.events
    with events.stage("compile"):
        binary = build(request.model, request.folder / library, request.shapes, plan=request.plan, child=child)
    if isinstance(binary, NoBinary):
        events.warning(f"no {library}: {binary.reason}")
        return Emission({"binary": None})
    with events.stage("check the binary"):
        try:
            feeds = fitting(binary, request.samples)
            check = checked(binary, check_binary(binary, request.model, feeds), library)
        except VerificationError as error:
            binary.library.unlink(missing_ok=True)
            events.warning(f"no {library}: {error}")
            return Emission({"binary": None})
    return Emission({"binary": library}, check)


def fitting(binary: Binary, samples: Sequence[Feeds]) -> list[Feeds]:
    """The samples that the library takes; random ones of its shapes where it takes none of them."""
    fitting = [
        feeds for feeds in samples if all(np.shape(feeds[name]) == shape for name, shape in binary.bound.items())
    ]
    if fitting:
        return fitting
    if not samples:
        raise VerificationError(f"{binary.library.name} has no sample to be checked on")
    specs = [TensorSpec(n, np.asarray(samples[0][n]).dtype.name, binary.bound[n]) for n in binary.inputs]
    return list(random_inputs(specs, {}, 1, seed=0).batches(1))
