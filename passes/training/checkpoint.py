"""The state of a training run in a file: written whole or not at all, read without unpickling."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from passes.errors import InputError, first_line

FORMAT = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values beside ``path`` first and renames them into place. InputError where it cannot."""
    temporary = path.with_name(f"{path.name}.tmp")  # what a killed process left of it is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer of archives raises RuntimeError on a full disk
        raise InputError(f"{path}: cannot be written: {first_line(error)}") from error
    finally:
        with suppress(OSError):  # gone already, or there is no place for it at all
            temporary.unlink()


def load(path: Path) -> dict[str, Any] | None:
    """What :func:`save` wrote; None where there is no such file. InputError where it is something else."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    return decoded(content, path)


def decoded(content: bytes, path: Path) -> dict[str, Any]:
    """The state in the bytes of a checkpoint; ``path`` names it in messages."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: is no checkpoint: {first_line(error)}; remove it to start over") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: is no checkpoint of this version; remove it to start over")
    return state
