"""Ctrl-C between two steps rather than inside one, so that what is saved is a state that the run was in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """``wanted`` once an interrupt has come that nothing has acted on yet."""

    wanted = False


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """A SIGINT or SIGTERM sets a mark; the same one again acts as it would have without this.

    Only the main thread may change handlers; in others the mark is never set, and the main one gets the interrupt.
    """
    mark = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield mark
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    seen: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        if number in seen:
            signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)
            signal.raise_signal(number)
        mark.wanted = True
        seen.add(number)

    ignored = (signal.SIG_IGN, None)  # None: set by something that is not Python
    taken = [number for number, handler in before.items() if handler not in ignored]
    try:
        for number in taken:
            signal.signal(number, note)
        yield mark
    finally:
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)
