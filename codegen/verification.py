"""Comparisons: a walk with onnxruntime, the written file with the network in memory, predictions with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from codegen.dataset import Dataset
from codegen.onnx_runs import run_file, run_network
from codegen.report.build import Verification
from codegen.tvm_check import difference
from codegen.walks import outputs_under, relative_error
from passes.errors import InputError, VerificationError
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Feeds, Stepper

if TYPE_CHECKING:
    import onnxruntime

WALK_RELATIVE_L2 = 1e-3
"""A walk in torch against onnxruntime, float32 in both: beyond this it computes something else."""

WALK_MAX_ABS = 1e-5
"""For outputs that are almost 0, of which a relative error says nothing."""

WRITTEN_RELATIVE_L2 = 1e-4
"""The written file against the network in memory: the same weights, so only the order of sums may differ."""


def walk_disagreement(network: OnnxGraph, stepper: Stepper, feeds: Feeds, samples: Dataset) -> str:
    """Where a walk over ``feeds`` and single runs of onnxruntime on the same ``samples`` differ; empty if nowhere."""
    walked = outputs_under(stepper, feeds, {})
    runs = run_network(network, list(samples.batches(1)))
    for index, spec in enumerate(network.outputs):
        wanted = torch.cat([torch.from_numpy(np.array(outputs[index], ndmin=1)) for outputs in runs]).reshape(-1)
        found = torch.as_tensor(walked[spec.name]).reshape(-1)
        if found.numel() != wanted.numel():
            return f"output {spec.name} of two samples has another size than that of single runs"
        error = relative_error({spec.name: found}, {spec.name: wanted})
        largest = float((found - wanted).abs().max()) if wanted.numel() else 0.0
        if error > WALK_RELATIVE_L2 and largest > WALK_MAX_ABS:
            return f"output {spec.name} differs from single runs by {error:.2g} (relative L2)"
    return ""


def verify_written(
    path: Path, network: OnnxGraph, samples: Sequence[Mapping[str, Any]], *, walked: bool
) -> Verification:
    """Reads the file back in onnxruntime and compares it with the network that was written.

    A large file is run in a fresh process, and its reference is a walk where the network can be ``walked``: that
    brings one layer at a time into memory.
    """
    found = run_file(path, samples, apart=network.is_large)
    limit = WRITTEN_RELATIVE_L2
    if network.is_large and walked:
        model, constants = network.skeleton()
        stepper = Stepper(model, network.sites().sites, constants)
        runs = [outputs_under(stepper, feeds, {}) for feeds in samples]
        wanted = [[run[spec.name].numpy() for spec in network.outputs] for run in runs]
        limit = WALK_RELATIVE_L2
    else:
        wanted = run_network(network, samples)
    check = difference(found, wanted)
    if not check.within(limit, WALK_MAX_ABS):
        raise VerificationError(
            f"{path.name}: read back, its outputs differ from the rewritten network's by {check.relative_l2:.2g} "
            f"(relative L2), at most {limit:g} was expected"
        )
    return Verification(True, check.relative_l2, check.max_abs, check.samples)


def accuracies(before: Path, after: Path, data: Dataset, *, apart: bool) -> tuple[float, float]:
    """Top-1 accuracy of two written networks on labelled data, by onnxruntime; ``apart`` in a fresh process each."""
    return top1(before, data, apart=apart), top1(after, data, apart=apart)


def top1(path: Path, data: Dataset, *, apart: bool = False, options: onnxruntime.SessionOptions | None = None) -> float:
    """Top-1 accuracy of a written network on labelled data, by onnxruntime; see :func:`codegen.onnx_runs.run_file`."""
    assert data.labels is not None
    labels = data.labels.reshape(-1)
    outputs = [run[0] for run in run_file(path, list(data.batches(250)), apart=apart, options=options)]
    classes = np.concatenate([np.atleast_2d(o).reshape(-1, o.shape[-1]).argmax(axis=1) for o in outputs])
    if classes.shape != labels.shape:
        raise InputError(
            f"{data.source}: {labels.size} labels for {classes.size} predictions; labels hold one class each"
        )
    return float((classes == labels).mean())
