"""Work in threads: NumPy and torch let go of the interpreter where the work is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 8192
"""Samples of a block."""


class Workers:
    """Maps over items in ``threads`` threads, each set up by ``begin``. Results come in the order of the items.

    What is added up in that order is the same for any number of threads.
    """

    def __init__(self, threads: int = 1, begin: Callable[[], None] | None = None) -> None:
        # an interrupt arrives at the end of the items that are at work: nobody but who made the pool waits in it
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

    def soon(self, work: Callable[[], R]) -> Callable[[], R]:
        """Has ``work`` done by one of the threads, or at once where there is none. What comes back waits for it."""
        if self._pool is None:
            found = work()
            return lambda: found
        return self._pool.submit(work).result

    def ahead(self, items: Iterator[T]) -> Ahead[T]:
        """``items``, of which the threads make the next one while the one before is in use."""
        return Ahead(self._pool, items)

    def abreast(self, items: Iterator[T], lanes: Sequence[Callable[[T], object]]) -> Generator[T, None, Any]:
        """Takes each of ``items`` through all lanes, then yields it; the same value in the end.

        A lane takes the items one at a time in their order, and is never two items ahead of another one, which is how
        far ahead they are made.
        """
        if self._pool is None:
            return (yield from _in_turn(items, lanes))
        held: deque[T] = deque()  # that some lane has yet to take
        passed = 0  # items that every lane has taken
        places = [0] * len(lanes)
        busy: dict[Future[Any], int | None] = {}  # with a lane, None with the source
        end: StopIteration | None = None
        while True:
            if end is None and None not in busy.values() and len(held) < 2:
                busy[self._pool.submit(_following, items)] = None
            for index, lane in enumerate(lanes):
                if index not in busy.values() and places[index] - passed < len(held):
                    busy[self._pool.submit(lane, held[places[index] - passed])] = index
            if end is not None and not busy:
                return end.value
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                index_ = busy.pop(future)
                if index_ is not None:
                    future.result()
                    places[index_] += 1
                elif isinstance(found := future.result(), StopIteration):
                    end = found
                else:
                    held.append(found[0])
            while held and min(places, default=passed + 1) > passed:
                passed += 1
                yield held.popleft()


class Ahead(Iterator[T]):
    """Items of which one is made in a pool's thread before it is asked for. Ends with the same value as they do.

    The next one is made from :meth:`begin` on; at once where the one before had to be waited for.
    """

    def __init__(self, pool: ThreadPoolExecutor | None, items: Iterator[T]) -> None:
        self._pool, self._items = pool, items
        self._coming: Future[tuple[T] | StopIteration] | None = None

    def begin(self) -> None:
        """Has the next item made. Best called where the threads have nothing else to do for a while."""
        if self._pool is not None and self._coming is None:
            self._coming = self._pool.submit(_following, self._items)

    def __next__(self) -> T:
        if self._pool is None:
            return next(self._items)
        self.begin()
        assert self._coming is not None
        late = not self._coming.done()
        found, self._coming = self._coming.result(), None
        if isinstance(found, StopIteration):
            raise StopIteration(found.value)
        if late:
            self.begin()
        return found[0]


def _following(items: Iterator[T]) -> tuple[T] | StopIteration:
    """The next item; an end that a future can carry."""
    try:
        return (next(items),)
    except StopIteration as end:
        return end


def _in_turn(items: Iterator[T], lanes: Sequence[Callable[[T], object]]) -> Generator[T, None, Any]:
    while True:
        try:
            item = next(items)
        except StopIteration as end:
            return end.value
        for lane in lanes:
            lane(item)
        yield item


ALONE = Workers()
"""The thread that calls."""
