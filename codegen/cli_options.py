"""Options that several commands have, and values that take reading: durations, shapes, where the JSON goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from passes.errors import UsageError

Json = Annotated[
    str | None, typer.Option("--json", help="Also write the result to this file; - prints it alone on stdout.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show notes as well.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")


def not_both(verbose: bool, quiet: bool) -> None:
    """Raises UsageError where a command is told to say more and to say nothing."""
    if verbose and quiet:
        raise UsageError("--verbose and --quiet contradict each other")


def duration_s(text: str) -> float:
    """``90s``, ``10m``, ``1h30m`` in seconds."""
    match = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise UsageError(f"--time-budget {text!r} is no duration; write 90s, 10m or 1h30m")
    return total


def shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``x=1,3,224,224`` per input; ``x=`` for a scalar. Input names may hold any character but the last ``=``."""
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        parts = [part.strip() for part in sizes.split(",")] if sizes.strip() else []
        if not (name and equals) or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            raise UsageError(f"--shape {text!r}: write INPUT=1,3,224,224 with sizes above zero")
        if name in found:
            raise UsageError(f"--shape {name} is given twice")
        found[name] = tuple(int(part) for part in parts)
    return found


def json_target(text: str | None) -> Path | None:
    """Where ``--json`` writes; ``Path("-")`` is stdout."""
    if text == "":
        raise UsageError("--json takes a file, or - for stdout")
    return None if text is None else Path(text)
