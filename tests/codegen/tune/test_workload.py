import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen.tune.workload import Workload
from passes.core.cost import StageWork
from passes.core.site import Geometry

sizes = st.integers(1, 300)


@st.composite
def works(draw: st.DrawFn) -> StageWork:
    n = draw(st.integers(0, 3))

    def per_axis(low: int, high: int, times: int = 1) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n * times))

    transposed = n > 0 and draw(st.booleans())
    groups = draw(st.integers(1, 4)) if n else 1
    geometry = Geometry(
        per_axis(1, 7),
        per_axis(1, 3),
        per_axis(1, 3),
        per_axis(0, 3, 2),
        groups,
        transposed,
        per_axis(0, 1) if transposed else (),
    )
    return StageWork(geometry, groups * draw(sizes), groups * draw(sizes), per_axis(8, 64), draw(sizes))


@given(works(), st.sampled_from(["float32", "float16"]))
def test_key_names_the_workload_and_nothing_else(work: StageWork, dtype: str) -> None:
    workload = Workload.of(work, dtype)
    assert Workload.parse(workload.key) == workload


def test_key_is_readable() -> None:
    work = StageWork(Geometry((3, 1), pads=(1, 0, 1, 0), groups=2), 16, 32, (32, 30), 1, bias=False)
    assert Workload.of(work).key == "conv 1x16x32x30 -> 32, kernel 3x1, pads 1,0,1,0, groups 2, float32"
    assert Workload.of(StageWork(Geometry(), 64, 10, (), 4)).key == "linear 4x64 -> 10, float32"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "conv",
        "conv 1x2 -> 3",
        "pool 1x2x3x3 -> 3, kernel 3x3, float32",
        "linear 1x2 -> 3, kernel 3, float32",
        "conv 1x2x3x3 -> 3, kernel 3, float32",
        "linear 1x2 -> 3, magic 7, float32",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Workload.parse(text)
