"""What the engine refuses: programs that cannot run, that never end, or that race."""

from __future__ import annotations

from accel_sim.program.errors import ProgramError


def refuse(index: int, what: str) -> ProgramError:
    """The error of the instruction at ``index`` of the code."""
    return ProgramError(what, "code", index)


class DeadlockError(ProgramError):
    """Queues wait for tokens that never come; the index is that of the first waiting instruction."""


class HazardError(ProgramError):
    """Bytes that were read before they were written, or that changed under an instruction that uses them.

    ``index``: the instruction that reads, or that changes the bytes. ``other``: the instruction that overlaps it in
    time, None where bytes were never written. ``memory`` and ``address``: the first byte concerned.
    """

    def __init__(self, what: str, index: int, other: int | None, memory: str, address: int) -> None:
        super().__init__(f"{what} ({memory}, byte {address})", "code", index)
        self.other = other
        self.memory = memory
        self.address = address
