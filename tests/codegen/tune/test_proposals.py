from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen.tune.device import Device
from codegen.tune.proposals import TemplateProposer
from codegen.tune.record import Record
from codegen.tune.schedule import Schedule
from codegen.tune.similarity import distance, family
from codegen.tune.workload import Workload
from tests.codegen.tune.tuning import DEVICE, Numbers, conv


def record(schedule: Schedule, seconds: float | None, workload: Workload = conv(8)) -> Record:  # noqa: B008
    error = "" if seconds is not None else "it broke"
    return Record(workload.key, DEVICE.key, "1", schedule, seconds, seconds, seconds, 10, error, "here", 0.0)


class Grid(Numbers):
    """Schedules of two parameters in the order of their sums; ``c`` is alike in all."""

    def __init__(self, size: int) -> None:
        cells = sorted(((a, b) for a in range(size) for b in range(size)), key=sum)
        self._all = [Schedule.of("grid", a=a, b=b, c=1) for a, b in cells]


@given(st.integers(1, 40), st.integers(1, 7), st.lists(st.floats(1e-6, 1e-3) | st.none(), min_size=40, max_size=40))
def test_everything_is_proposed_once(size: int, count: int, seconds: list[float | None]) -> None:
    proposer, known = TemplateProposer(DEVICE, Numbers(size)), []
    while new := proposer.propose(conv(8), known, [], count):
        assert len(new) <= count
        known += [record(schedule, seconds[schedule["tile"]]) for schedule in new]
    assert known[0].schedule["tile"] == 0
    assert sorted(r.schedule["tile"] for r in known) == list(range(size))


def test_the_default_then_the_neighbours_then_the_head_of_the_space() -> None:
    proposer = TemplateProposer(DEVICE, Numbers(50))
    neighbours = [record(Schedule.of("tiles", tile=tile), 1e-3, conv(16)) for tile in (30, 0, 99, 20)]
    new = proposer.propose(conv(8), [], neighbours, 5)
    assert [s["tile"] for s in new] == [0, 30, 20, 1, 2]  # 99 is none of the space's


def test_what_is_near_the_best_is_tried_again_and_again() -> None:
    proposer = TemplateProposer(DEVICE, Grid(20))
    best = Schedule.of("grid", a=10, b=11, c=1)
    known = [record(best, 1e-6)]
    while len(known) < 30:
        known += [record(s, 1e-3) for s in proposer.propose(conv(8), known, [], 1)]
    near = [r for r in known[1:] if (r.schedule["a"] == 10) != (r.schedule["b"] == 11)]
    assert len(near) >= 8  # a third of what follows the head; at random there would be 38 of 400
    head = [(r.schedule["a"], r.schedule["b"]) for r in known if sum((r.schedule["a"], r.schedule["b"])) <= 2]
    assert len(head) == 6  # the most promising are not forgotten over it


def test_proposals_depend_on_the_seed_and_on_nothing_else() -> None:
    def run(seed: int) -> list[Schedule]:
        proposer, known = TemplateProposer(DEVICE, Grid(20), seed=seed), []
        while len(known) < 20:
            # A new proposer now and then, as where a run goes on.
            if len(known) == 7:
                proposer = TemplateProposer(DEVICE, Grid(20), seed=seed)
            known += [record(s, 1e-3) for s in proposer.propose(conv(8), known, [], 1)]
        return [r.schedule for r in known]

    assert run(1) == run(1) != run(2)


def test_families_have_the_same_loops() -> None:
    keys = {
        "conv 1x16x8x8 -> 16, kernel 3x3, float32": "conv 2-D dense float32",
        "conv 1x16x8x8 -> 16, kernel 1x1, float32": "conv 2-D pointwise float32",
        "conv 1x16x8x8 -> 32, kernel 3x3, groups 16, float32": "conv 2-D depthwise float32",
        "conv 1x16x8x8 -> 16, kernel 3x3, groups 4, float32": "conv 2-D grouped float32",
        "conv 1x16x8 -> 16, kernel 3, float32": "conv 1-D dense float32",
        "conv_transpose 1x16x8x8 -> 16, kernel 3x3, float32": "conv_transpose 2-D dense float32",
        "linear 1x16 -> 16, float32": "linear float32",
        "linear 1x16 -> 16, float16": "linear float16",
    }
    assert {key: family(Workload.parse(key)) for key in keys} == keys


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("conv 1x16x16x16 -> 16, kernel 3x3, pads 1,1,1,1, float32", 0.0),
        ("conv 1x16x16x16 -> 24, kernel 3x3, pads 1,1,1,1, float32", log2(1.5)),
        ("conv 2x4x16x16 -> 16, kernel 3x3, pads 1,1,1,1, float32", 3.0),  # 2 / 1 and 16 / 4
        # Strides of 2 twice; outputs of 8 x 8, which is 2 / 1 twice as well.
        ("conv 1x16x16x16 -> 16, kernel 3x3, strides 2,2, pads 1,1,1,1, float32", 4.0),
        ("conv 1x16x32x16 -> 16, kernel 3x1, pads 1,0,1,0, float32", 1 + log2(3)),
    ],
)
def test_distance_adds_doublings(key: str, expected: float) -> None:
    first, other = conv(16, 16), Workload.parse(key)
    assert distance(first, other) == distance(other, first) == pytest.approx(expected, abs=1e-12)


def test_a_device_s_threads_are_part_of_its_name() -> None:
    assert Device({"kind": "llvm"}, "m", 1, 512, 32).key != Device({"kind": "llvm"}, "m", 2, 512, 32).key
