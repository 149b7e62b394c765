"""What is said of an exception in one line."""

from __future__ import annotations

import pytest

from passes.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n  one  \ntwo"), "one"),
        (ValueError(), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory"),
        (OSError("the disk is gone"), "the disk is gone"),
        (ValueError("x" * 1000), "x" * 300),
    ],
)
def test_first_line(error: Exception, said: str) -> None:
    assert first_line(error) == said
