"""Data of Python callers as files: whatever they hand over becomes an .npz, which the pipeline reads like any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codegen.dataset_files import LABELS
from passes.errors import InputError, first_line

Array = NDArray[Any]

Data = Any
"""A source as on the command line; arrays or tensors by input name, and "labels"; one array for a network of one input;
``(inputs..., labels)`` in their order; or an iterable of any of these, batch by batch, such as a DataLoader."""


def source_of(data: Data, names: Sequence[str], option: str, folder: Path) -> str:
    """``data`` as a source that the command line would take, written into ``folder`` if it is none yet.

    InputError names ``option`` where the data are of no known form.
    """
    if isinstance(data, str | Path):
        return str(data)
    arrays = _arrays(data, names, option)
    path = folder / f"{option}.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def _arrays(data: Data, names: Sequence[str], option: str) -> dict[str, Array]:
    if _is_batch(data):
        return _named(data, names, option)
    if not isinstance(data, Iterable):
        raise InputError(f"{option}: is a {type(data).__name__}; {_FORMS}")
    parts = [_named(item, names, option) for item in data]
    if not parts:
        raise InputError(f"{option}: holds no samples")
    if len({frozenset(part) for part in parts}) > 1:
        raise InputError(f"{option}: its batches hold different inputs")
    return {name: _joined([part[name] for part in parts], name, option) for name in parts[0]}


def _joined(parts: Sequence[Array], name: str, option: str) -> Array:
    shapes = dict.fromkeys(part.shape[1:] for part in parts if part.ndim)
    if len(shapes) != 1 or not all(part.ndim for part in parts):
        found = " and ".join(str(shape) for shape in dict.fromkeys(part.shape for part in parts))
        raise InputError(
            f"{option}: its batches do not fit together: {name!r} comes in shapes {found}; each item of a list is a "
            "batch, a tuple (inputs, labels) is all samples at once"
        )
    return np.concatenate(parts)


_FORMS = (
    "give a path, arrays by input name (and 'labels'), one array, a tuple (inputs, labels), or an iterable of these, "
    "batch by batch"
)


def _is_batch(data: Data) -> bool:
    """True for a mapping, an array, or a tuple of arrays: all samples at once. A list holds batches, or inputs."""
    if isinstance(data, Mapping | torch.Tensor | np.ndarray):
        return True
    return isinstance(data, tuple) and all(isinstance(part, torch.Tensor | np.ndarray) for part in data)


def _named(item: Data, names: Sequence[str], option: str) -> dict[str, Array]:
    if isinstance(item, Mapping):
        return {str(name): _array(value, option) for name, value in item.items()}
    if isinstance(item, torch.Tensor | np.ndarray):
        item = (item,)
    if not isinstance(item, tuple | list):
        raise InputError(f"{option}: holds a {type(item).__name__}; {_FORMS}")
    if not len(names) <= len(item) <= len(names) + 1:
        raise InputError(
            f"{option}: holds {len(item)} arrays, the network has {len(names)} inputs ({', '.join(names)}); give one "
            "for each, in their order, and labels at the end or not at all"
        )
    return {name: _array(value, option) for name, value in zip((*names, LABELS), item, strict=False)}


def _array(value: Any, option: str) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype is torch.bfloat16 else value
    try:
        array = np.asarray(value.numpy() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of differing lengths, sparse tensors
        raise InputError(f"{option}: holds what is no array: {first_line(error)}") from error
    if array.dtype.kind not in "fiub":
        raise InputError(f"{option}: holds an array of type {array.dtype}; give numbers")
    return array
