from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from passes.core.workers import Workers

COUNT = 40


def _numbers(made: list[int]) -> Generator[int, None, str]:
    for number in range(COUNT):
        made.append(number)
        yield number
    return "the end"


def _run(steps: Generator[int, None, str]) -> tuple[list[int], str]:
    passed = []
    while True:
        try:
            passed.append(next(steps))
        except StopIteration as end:
            return passed, end.value


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_lane_takes_all_items_in_their_order(threads: int, lanes: int) -> None:
    taken: list[list[int]] = [[] for _ in range(lanes)]
    with Workers(threads) as workers:
        found = _run(workers.abreast(_numbers([]), [each.append for each in taken]))
    assert found == (list(range(COUNT)), "the end")
    assert taken == [list(range(COUNT))] * lanes


def test_lanes_run_at_the_same_time() -> None:
    met = threading.Barrier(2, timeout=60)
    with Workers(2) as workers:
        assert _run(workers.abreast(_numbers([]), [lambda _: met.wait(), lambda _: met.wait()]))[1] == "the end"


def test_a_lane_and_the_source_get_one_item_ahead_and_no_more() -> None:
    made: list[int] = []
    taken: list[list[int]] = [[], []]
    ahead: list[tuple[int, int]] = []
    more = threading.Condition()

    def fast(number: int) -> None:
        with more:
            taken[0].append(number)
            more.notify()

    def slow(number: int) -> None:
        with more:  # not before the other one has taken the next item too
            assert more.wait_for(lambda: len(taken[0]) >= min(number + 2, COUNT), timeout=60)
            ahead.append((len(taken[0]) - number, len(made) - number))
            taken[1].append(number)

    with Workers(3) as workers:
        assert _run(workers.abreast(_numbers(made), [fast, slow]))[0] == list(range(COUNT))
    assert set(ahead[:-1]) == {(2, 2)} and ahead[-1] == (1, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_lane_arrives(threads: int) -> None:
    third = threading.Event()

    def fails(number: int) -> None:
        if number == 3:  # not before the other lane has taken the one before
            assert third.wait(60)
            raise ArithmeticError("the third")

    passed = []
    with Workers(threads) as workers, pytest.raises(ArithmeticError, match="the third"):
        for number in workers.abreast(_numbers([]), [fails, lambda _: None]):
            passed.append(number)
            if number == 2:
                third.set()
    assert passed == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_source_arrives(threads: int) -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        raise ArithmeticError("no second one")

    taken: list[int] = []
    with Workers(threads) as workers, pytest.raises(ArithmeticError, match="no second one"):
        list(workers.abreast(source(), [taken.append]))
    assert taken in ([1], [])


def test_no_items_are_the_end_at_once() -> None:
    def empty() -> Generator[int, None, int]:
        return 7
        yield

    with Workers(2) as workers:
        assert _run(workers.abreast(empty(), [print, print])) == ([], 7)  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("threads", [1, 2])
def test_work_that_is_handed_over_comes_back(threads: int) -> None:
    def fails() -> int:
        raise ArithmeticError("at last")

    with Workers(threads) as workers:
        results = [workers.soon(lambda number=number: number * number) for number in range(COUNT)]  # type: ignore[misc]
        assert [result() for result in results] == [number * number for number in range(COUNT)]
        with pytest.raises(ArithmeticError, match="at last"):
            workers.soon(fails)()


def test_work_that_is_handed_over_runs_beside() -> None:
    met = threading.Barrier(2, timeout=60)
    with Workers(2) as workers:
        result = workers.soon(met.wait)
        met.wait()
        assert result() in (0, 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("begun", [False, True])
def test_items_ahead_are_all_items_and_the_same_end(threads: int, begun: bool) -> None:
    passed = []
    with Workers(threads) as workers:
        coming = workers.ahead(_numbers([]))
        while True:
            try:
                passed.append(next(coming))
            except StopIteration as end:
                assert (passed, end.value) == (list(range(COUNT)), "the end")
                return
            if begun:
                coming.begin()
                coming.begin()


def test_an_item_ahead_is_made_from_its_beginning_on() -> None:
    made: list[int] = []
    here = threading.get_ident()
    places: set[int] = set()
    second = threading.Event()

    def source() -> Generator[int, None, str]:
        for number in _numbers(made):
            places.add(threading.get_ident())
            if number == 1:
                second.set()
            yield number
        return "the end"

    with Workers(2) as workers:
        coming = workers.ahead(source())
        assert (next(coming), made) == (0, [0])
        coming.begin()
        assert second.wait(60) and made == [0, 1]
        assert (next(coming), made) == (1, [0, 1])
    assert here not in places


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_an_item_ahead_arrives(threads: int) -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        raise ArithmeticError("no second one")

    with Workers(threads) as workers:
        coming = workers.ahead(source())
        assert next(coming) == 1
        coming.begin()
        with pytest.raises(ArithmeticError, match="no second one"):
            next(coming)
