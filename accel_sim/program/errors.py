"""The one error of programs."""

from __future__ import annotations


class ProgramError(ValueError):
    """A program that cannot be read, written or run; the message says what is wrong, where, and what was expected.

    ``section``: the part of the program, as in the container's section table, or "header"; "listing" for its text
    form. ``index``: the entry in that section - for "code" the instruction's index, for "listing" the line, from 1 on -
    or None. ``column``: in a listing, from 1 on.
    """

    def __init__(self, what: str, section: str, index: int | None = None, column: int | None = None) -> None:
        self.section = section
        self.index = index
        self.column = column
        if section == "code" and index is not None:
            where = f"instruction {index}"
        elif section == "listing":
            where = f"line {index}" if column is None else f"line {index}, column {column}"
        else:
            where = section if index is None else f"{section}[{index}]"
        super().__init__(f"{where}: {what}")
