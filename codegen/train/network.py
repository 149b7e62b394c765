"""The network that is to be trained: built in, made by a function of the user's, or read from ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from codegen.dataset_files import LABELS, pieces, script_function, split_source
from codegen.reproduce import networks
from passes.errors import InputError, UnsupportedError, UsageError
from passes.graph import TensorSpec

if TYPE_CHECKING:
    from passes.onnx_graph import OnnxGraph
    from passes.training.network import TrainableNetwork

Tensor = torch.Tensor

BUILT_IN = ("resnet20", "resnet56", "vgg16")
INPUT, OUTPUT = "input", "logits"
BATCH = "batch"


@dataclass(eq=False)
class Source:
    """A network before training. ``graph`` and ``trainable``: where it came from and what ``module`` is part of, for
    one from ONNX; of others ``module`` is the network itself."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    graph: OnnxGraph | None = None
    trainable: TrainableNetwork | None = None

    def example(self, count: int = 1) -> list[Tensor]:
        """Inputs of zeros, ``count`` samples."""
        dtypes = [torch.from_numpy(np.zeros(1, spec.dtype)).dtype for spec in self.inputs]
        sizes = [[count, *(int(size or 1) for size in spec.shape[1:])] for spec in self.inputs]
        return [torch.zeros(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]

    def called(self) -> dict[str, str]:
        """What layers are called in the file, by their paths in the module."""
        return {} if self.trainable is None else {path: name for name, path in self.trainable.layers.items()}


def load(written: str, data: str, inputs: Sequence[str], outputs: Sequence[str], seed: int) -> Source:
    """The network ``written`` on the command line, its weights drawn by ``seed``; inputs are as ``data`` has them.

    UsageError for a name that is none, InputError where the script fails or the file cannot be read, UnsupportedError
    where a network from ONNX cannot be trained.
    """
    path, function = split_source(written)
    if path.suffix == ".onnx":
        return _from_onnx(path, inputs, outputs)
    torch.manual_seed(seed)
    if written in BUILT_IN:
        module: nn.Module = getattr(networks, written)()
    elif path.suffix == ".py" and function:
        module = _from_script(path, function)
    else:
        raise UsageError(
            f"--network {written!r}: give one of {', '.join(BUILT_IN)}, FILE.py:FUNCTION that returns an nn.Module, "
            "or an .onnx"
        )
    specs = data_specs(data, inputs)
    found = Source(module, specs, ())
    count = _outputs(found)
    names = tuple(outputs) or ((OUTPUT,) if count == 1 else tuple(f"{OUTPUT}_{i}" for i in range(count)))
    if len(names) != count:
        raise UsageError(f"{len(names)} names for {count} outputs: {', '.join(names)}")
    return Source(module, specs, names)


def data_specs(source: str, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    """Inputs as the first piece of ``source`` has them: its keys, or ``names`` in their order; batches of any size."""
    piece = next(iter(pieces(source, list(names) or [INPUT])), None)
    if piece is None:
        raise InputError(f"{source}: holds no samples")
    arrays = {name: array for name, array in piece.arrays.items() if name != LABELS}
    wanted = tuple(names) or tuple(arrays)
    missing = [name for name in wanted if name not in arrays]
    if missing or not wanted:
        found = ", ".join(arrays) or "none"
        raise InputError(f"{source}: has no data for the input {(*missing, INPUT)[0]!r}; it has {found}")
    if len(wanted) > 1 and not names:
        raise UsageError(f"the data has the inputs {', '.join(wanted)}; give --input in the order of the forward")
    dtypes = {name: "float32" if arrays[name].dtype.kind == "f" else str(arrays[name].dtype) for name in wanted}
    return tuple(TensorSpec(name, dtypes[name], (BATCH, *arrays[name].shape[1:])) for name in wanted)


def _outputs(source: Source) -> int:
    training = {m: m.training for m in source.module.modules()}
    try:
        with torch.no_grad():
            found: Any = source.module.eval()(*source.example())
    except Exception as error:
        shapes = ", ".join(f"{spec.name} {spec.dtype} {(1, *spec.shape[1:])}" for spec in source.inputs)
        first = next(iter(str(error).splitlines()), "")
        raise UnsupportedError(f"the network does not run on {shapes}: {type(error).__name__}: {first}") from error
    finally:
        for m, mode in training.items():
            m.training = mode
    several = found if isinstance(found, tuple | list) else [found]
    if not several or not all(isinstance(x, Tensor) for x in several):
        raise UnsupportedError(f"the network returns {type(found).__name__}, expected a tensor or a tuple of them")
    return len(several)


def _from_script(path: Path, function: str) -> nn.Module:
    make = script_function(path, function)
    if make is None:
        raise InputError(f"{path}: defines no function {function}(); name it as {path.name}:FUNCTION")
    found = make()
    if not isinstance(found, nn.Module):
        raise InputError(f"{path}:{function}: returned a {type(found).__name__}, expected a torch.nn.Module")
    return found


def _from_onnx(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> Source:
    from passes.onnx_graph import OnnxGraph
    from passes.onnx_module import to_trainable

    if inputs or outputs:
        raise UsageError("--input and --output-name are for networks without names of their own")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    graph = OnnxGraph.read(path, {})
    trainable = to_trainable(graph)
    return Source(trainable.module, graph.inputs, trainable.outputs, graph, trainable)
