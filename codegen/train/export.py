"""A trained network as ONNX, and what the file computes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from codegen.train.network import Source
from passes.core.site import Array
from passes.errors import VerificationError
from passes.training.data import LABELS, TrainingSet
from passes.training.factored import ordinary

if TYPE_CHECKING:
    import onnx

Tensor = torch.Tensor

RELATIVE_L2 = 1e-4
"""torch against onnxruntime, float32 in both: beyond this the file computes something else."""


def to_onnx(module: nn.Module, source: Source) -> onnx.ModelProto:
    """The module in inference form; BatchNorm stays a node, so that lowering has it to fold. Symbolic batch.

    A network that came from ONNX keeps its own names, nodes and shapes; in others layers are named by module path.
    """
    if source.graph is not None and source.trainable is not None:
        from passes.onnx_module import trained

        return trained(source.graph, source.trainable).model()
    from passes.fx_export import to_onnx as exported

    names = [spec.name for spec in source.inputs]
    return exported(ordinary(module), source.example(2), names, source.outputs)


def with_metadata(model: onnx.ModelProto, facts: Mapping[str, Any]) -> onnx.ModelProto:
    """The same with ``facts`` in its metadata, values as JSON."""
    from onnx import helper

    kept = {entry.key: entry.value for entry in model.metadata_props}
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in facts.items()
    }
    helper.set_model_props(model, {**kept, **texts})
    return model


def verify(path: Path, module: nn.Module, data: TrainingSet, samples: int = 64) -> dict[str, Any]:
    """The file run by onnxruntime against the module, on the first samples; VerificationError where they differ."""
    samples = min(samples, len(data))
    batch = data.take(torch.arange(samples))
    inputs = [x.cpu() for name, x in batch.items() if name != LABELS]
    module = ordinary(module).cpu().eval()
    with torch.no_grad():
        wanted = module(*inputs)
    first = (wanted[0] if isinstance(wanted, tuple | list) else wanted).numpy().astype(np.float64)
    found = np.concatenate(list(run(path, data, samples, samples))).astype(np.float64)
    norm = float(np.linalg.norm(first))
    relative = float(np.linalg.norm(found - first)) / norm if norm else float(np.linalg.norm(found))
    worst = float(np.abs(found - first).max())
    if not relative <= RELATIVE_L2:
        raise VerificationError(
            f"{path.name}: onnxruntime and the trained network differ by {relative:.2g} (relative L2), "
            f"at most {RELATIVE_L2:g} was expected"
        )
    return {"relative_l2": relative, "max_abs": worst, "samples": len(found)}


def top1(path: Path, data: TrainingSet) -> float:
    """Accuracy of the file on labelled samples, by onnxruntime."""
    assert data.labels is not None
    scores = np.concatenate(list(run(path, data, len(data))))
    return float(np.mean(scores.argmax(axis=1) == data.labels.cpu().numpy()))


def run(path: Path, data: TrainingSet, samples: int, batch: int = 250) -> Iterator[Array]:
    """The file's first output, batch by batch, a row a sample.

    A file of a fixed batch gets batches of that size; the last one is filled up with its last sample, and what comes
    out for the filling is dropped.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in session.get_inputs()]
    fixed = [spec.shape[0] for spec in session.get_inputs() if spec.shape and isinstance(spec.shape[0], int)]
    step = fixed[0] if fixed else batch
    for start in range(0, samples, step):
        count = min(step, samples - start)
        part = data.take(torch.arange(start, start + (step if fixed else count)).clamp_max(samples - 1))
        found = session.run(None, {name: part[name].cpu().numpy() for name in names})[0]
        yield found[:count] if count < step and fixed else found
