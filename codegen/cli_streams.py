"""What every command shares: its streams, its signals, and errors that end in an exit code and one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from passes.errors import InputError, RankcError, UsageError

if TYPE_CHECKING:
    from codegen.events import Events

DONE, OUR_FAULT, MISSED, INTERRUPTED = 0, 1, 3, 130
STDOUT = Path("-")


def guarded(action: Callable[[], int], interrupted: Callable[[], str], *, debug: bool) -> int:
    """Carries out ``action`` and returns its exit code; an error becomes one line on stderr and the code for it.

    ``interrupted`` says what is left of the run after Ctrl-C or SIGTERM.
    """
    try:
        with interruptible():
            if not (debug or sys.warnoptions):
                warnings.simplefilter("ignore")  # what libraries tell programmers is nothing for users
            return action()
    except RankcError as error:
        say(f"error: {error}", debug)
        return error.exit_code
    except KeyboardInterrupt:
        say(f"interrupted: {interrupted()}", debug)
        return INTERRUPTED
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        hint = "" if debug else " (--debug shows where)"
        say(f"error: this is a fault in rankc: {type(error).__name__}: {first}{hint}", debug)
        return OUR_FAULT


@contextmanager
def events(verbose: bool, quiet: bool) -> Iterator[Events]:
    """Progress on stderr while a command works; nothing with ``quiet``."""
    from codegen.events import QuietEvents
    from codegen.report.console import ConsoleEvents

    if quiet:
        yield QuietEvents()
    else:
        with ConsoleEvents(verbose=verbose) as console:
            yield console


def check_json_target(json_to: Path | None) -> None:
    """A long run must not end in a report that has nowhere to go."""
    if json_to is not None and json_to != STDOUT and (json_to.is_dir() or not json_to.absolute().parent.is_dir()):
        raise UsageError(f"--json {json_to}: give a file in a folder that exists, or - for stdout")


def write(json_to: Path | None, text: str) -> None:
    """Writes what ``--json FILE`` asked for; stdout is the command's own business."""
    if json_to is None or json_to == STDOUT:
        return
    try:
        json_to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{json_to}: cannot be written: {error.strerror}") from error


def present(
    text: str, show: Callable[[TextIO], None], stdout: TextIO, json_to: Path | None, *, quiet: bool = False
) -> None:
    """A command's result where the user wants it: ``text``, which is JSON, alone on stdout or in the file ``json_to``.

    Unless stdout is taken by it, ``show`` writes the result there for people; not with ``quiet``.
    """
    with closed_pipe_is_fine(stdout):
        if json_to == STDOUT:
            stdout.write(text)
        elif not quiet:
            show(stdout)
    write(json_to, text)


@contextmanager
def own_stdout(quiet: bool) -> Iterator[TextIO]:
    """The real stdout as a stream; meanwhile descriptor 1 leads to stderr (with ``quiet``, nowhere).

    Native libraries print to descriptor 1, which must not end up between results. HiGHS 1.12 does, whatever its
    options say: a line of its source code when a solution of the presolved problem has to be repaired for the original
    one (ERGO-Code/HiGHS, issue 2783).
    """
    sys.stdout.flush()
    real = os.dup(1)
    with open(os.devnull, "w") if quiet else os.fdopen(os.dup(2), "w") as elsewhere:
        os.dup2(elsewhere.fileno(), 1)
        try:
            with redirect_stdout(elsewhere), os.fdopen(os.dup(real), "w", encoding="utf-8") as stream:
                yield stream
        finally:
            os.dup2(real, 1)
            os.close(real)


@contextmanager
def closed_pipe_is_fine(stream: TextIO) -> Iterator[None]:
    """``rankc lower ... | head`` is no error."""
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a run the way Ctrl-C does: with its state saved."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(" ".join(line.splitlines()), file=sys.stderr)
