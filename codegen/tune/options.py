"""What a run says of tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TuningOptions:
    """What a run says of tuning; None leaves it to the target.

    ``database``: the file of trials. ``trials`` of a layer. ``rpc``: the tracker of a device farm as HOST:PORT, and
    the devices' key there. ``effort`` as in :class:`codegen.config.LowerConfig`.
    """

    database: Path | None = None
    trials: int | None = None
    rpc: str | None = None
    rpc_key: str | None = None
    effort: str = "default"

    @property
    def named(self) -> tuple[str, ...]:
        """The options that were given, but for the effort, which others than tuners know too."""
        given = {"--database": self.database, "--trials": self.trials, "--rpc": self.rpc, "--rpc-key": self.rpc_key}
        return tuple(name for name, value in given.items() if value is not None)
