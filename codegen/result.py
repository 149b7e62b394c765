"""What a run hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, eq=False)
class LowerResult:
    """``report`` is report.json as a dict; ``missed``: a budget or the error limit is not met (exit 3).

    ``output`` is the folder that was written; None where nothing was.
    """

    report: dict[str, Any]
    missed: bool
    output: Path | None


@dataclass(frozen=True)
class InspectRow:
    """One node in a dry run, and why it is what it is."""

    node: str
    op: str
    status: Literal["rewritable", "kept", "unsupported"]
    reason: str
