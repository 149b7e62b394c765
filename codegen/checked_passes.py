"""Passes that keep a network's values, run with proof: outputs before and after each, by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from codegen.events import Events
from passes.drop_dead_code import DropDeadCode
from passes.drop_identities import DropIdentities
from passes.errors import InputError, VerificationError
from passes.fold_batchnorm import FoldBatchNorm
from passes.instruments import NumericCheck
from passes.manager import Instrument, Pass, PassManager, PipelineResult
from passes.onnx_graph import OnnxGraph

CANONICAL = (DropIdentities(), FoldBatchNorm(), DropDeadCode())
"""What every network goes through before its sites are looked at, in a run and in a dry run alike."""

RELATIVE_L2 = 1e-3
"""float32 with a factor folded in: a network of 100 layers stays below 1e-5; a wrong fold does not."""

COARSE_RELATIVE_L2 = 5e-2
"""Where values pass through int8 or float16: one that lies on a rounding step may fall to either side."""


def run_checked(
    passes: Sequence[Pass],
    network: OnnxGraph,
    feeds: Mapping[str, Any],
    instruments: Sequence[Instrument],
    events: Events,
) -> tuple[OnnxGraph, PipelineResult]:
    """A rewritten copy of ``network`` whose outputs on ``feeds`` are the same after each pass.

    Where a pass changes them, the network is returned as it is, with a warning: it is right, if not as simple. Large
    networks and those that onnxruntime cannot run go unchecked; of the latter a note is given.
    """
    copy = network.clone()
    if network.is_large:
        return copy, PassManager(passes, instruments).run(copy)
    try:
        copy.run(feeds)
    except InputError as error:
        names = ", ".join(step.name for step in passes)
        events.note(f"{names}: not checked by values: {error}")
        return copy, PassManager(passes, instruments).run(copy)
    check = NumericCheck([feeds], COARSE_RELATIVE_L2 if _is_coarse(network) else RELATIVE_L2)
    try:
        return copy, PassManager(passes, [*instruments, check]).run(copy)
    except VerificationError as error:
        events.warning(f"{error}: the network is taken without this pass and those beside it")
        return network, PipelineResult()


def _is_coarse(network: OnnxGraph) -> bool:
    ops = network.workload()
    narrow = any(0 < op.weight_bytes < 4 * op.weight_params for op in ops)
    return narrow or any(op.op.endswith("QuantizeLinear") for op in ops)
