"""Arrays of a run in files: inputs by the names of the library's metadata, or random ones; outputs as a .npz."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.runner.metadata import Metadata
from passes.errors import InputError, UsageError

Array = NDArray[Any]


def read_inputs(path: Path, metadata: Metadata) -> dict[str, Array]:
    """Arrays of a .npz, its keys the names of inputs ("labels" is left out), or of a .npy for a network's one input.

    InputError for a file that cannot be read; what does not fit is found when it is run. Nothing is unpickled.
    """
    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                if len(metadata.inputs) != 1:
                    names = ", ".join(info.name for info in metadata.inputs)
                    raise InputError(f"{path}: one array for {len(metadata.inputs)} inputs: give a .npz with {names}")
                return {metadata.inputs[0].name: found}
            with found:
                known = {info.name for info in metadata.inputs}
                return {name: found[name] for name in found.files if name in known or name != "labels"}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no .npz or .npy file of plain arrays: {error}") from error


def random_inputs(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """Standard normal floats, integers of 0 and 1. A symbolic size is that of ``shapes`` (input -> shape), else 1.

    UsageError for a shape of an unknown input or of another length.
    """
    sizes: dict[str, int] = {}
    wanted = {info.name: info for info in metadata.inputs}
    for name, shape in shapes.items():
        if name not in wanted:
            raise UsageError(f"--shape {name}: there is no such input, but {', '.join(wanted)}")
        misfit = wanted[name].misfit(wanted[name].dtype, shape, sizes)
        if misfit:
            raise UsageError(f"--shape: {misfit}")
    made = {}
    generator = np.random.default_rng(seed)
    for name, info in wanted.items():
        shape = tuple(dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in info.shape)
        if np.dtype(info.dtype).kind == "f":
            made[name] = generator.standard_normal(shape).astype(info.dtype)
        else:
            made[name] = generator.integers(0, 2, math.prod(shape)).reshape(shape).astype(info.dtype)
    return made


def write_outputs(path: Path, outputs: Mapping[str, Array]) -> None:
    """A .npz with any names, also those that numpy.savez has other uses for. InputError where it cannot be written."""
    try:
        with zipfile.ZipFile(path, "w") as archive:
            for name, value in outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, value, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
