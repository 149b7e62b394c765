"""The state of a training run in a file: written whole or not at all, read without unpickling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from passes.errors import InputError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values beside ``path`` first and renames them into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any] | None:
    """What :func:`save` wrote; None where there is no such file. InputError where it is something else."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: is no checkpoint: {str(error).splitlines()[0]}; remove it to start over") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: is no checkpoint of this version; remove it to start over")
    return state
