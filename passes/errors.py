"""What can go wrong, as one line for a person: what, where, what was expected, what to do.

``exit_code`` is the command line's contract: 2 usage, 4 input unusable, 5 verification failed.
"""

from __future__ import annotations


class RankcError(Exception):
    """Base of every error that is reported in one line and without a traceback."""

    exit_code = 1


class UsageError(RankcError):
    """The call itself is wrong: an option, a combination of options, a name."""

    exit_code = 2


class InputError(RankcError):
    """A file or an array that was handed in cannot be used."""

    exit_code = 4


class UnsupportedError(InputError):
    """The input is valid, but holds something that rankc cannot carry."""


class VerificationError(RankcError):
    """A result differs from its reference by more than it may."""

    exit_code = 5


def first_line(error: BaseException) -> str:
    """What an exception says in one line: the system's reason, else the first line with text, else its type's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:300] for line in lines if line), type(error).__name__)
