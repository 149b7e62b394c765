"""The one error of programs."""

from __future__ import annotations


class ProgramError(ValueError):
    """A program that cannot be read, written or run; the message says what is wrong, where, and what was expected.

    ``section``: the part of the program, as in the container's section table, or "header"; "listing" for its text
    form. ``index``: the entry in that section (for "code" the instruction's index), or None.
    """

    def __init__(self, what: str, section: str, index: int | None = None) -> None:
        self.section = section
        self.index = index
        if section == "code" and index is not None:
            where = f"instruction {index}"
        else:
            where = section if index is None else f"{section}[{index}]"
        super().__init__(f"{where}: {what}")
