"""Work in threads: NumPy and torch let go of the interpreter where the work is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 8192
"""Samples of a block."""


class Workers:
    """Maps over items in ``threads`` threads, each set up by ``begin``. Results come in the order of the items.

    What is added up in that order is the same for any number of threads.
    """

    def __init__(self, threads: int = 1, begin: Callable[[], None] | None = None) -> None:
        # the pool is waited for by the main thread alone, so that an interrupt arrives at the end of an item
        self._pool = None if threads < 2 else ThreadPoolExecutor(threads, initializer=begin)
        self._window = 2 * threads

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results one by one, made not much before they are asked for: they may be large."""
        if self._pool is None:
            yield from map(work, items)
            return
        coming: deque[Future[R]] = deque()
        for item in items:
            coming.append(self._pool.submit(work, item))
            if len(coming) == self._window:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def blocks(self, work: Callable[[slice], R], count: int, block: int = BLOCK) -> Iterator[R]:
        """:meth:`each` over slices of ``block`` out of ``count`` samples."""
        return self.each(work, (slice(start, min(start + block, count)) for start in range(0, count, block)))

    def ahead(self, items: Generator[T, None, R]) -> Generator[T, None, R]:
        """``items``, each made by one of the threads while the one before is in use; the same value in the end."""
        if self._pool is None:
            return (yield from items)

        def following() -> tuple[T] | StopIteration:
            try:
                return (next(items),)
            except StopIteration as end:
                return end

        found = self._pool.submit(following).result()
        while not isinstance(found, StopIteration):
            coming = self._pool.submit(following)
            yield found[0]
            found = coming.result()
        value: R = found.value
        return value


ALONE = Workers()
"""The thread that calls."""
