from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from passes.core.site import Geometry, Stage
from passes.drop_identities import DropIdentities
from passes.errors import UsageError, VerificationError
from passes.fold_batchnorm import FoldBatchNorm
from passes.graph import Graph
from passes.instruments import DumpIR, NumericCheck, Timing
from passes.manager import Pass, PassManager, PassResult
from tests.sequential_graph import SequentialGraph, Step

FEEDS = [{"x": np.random.default_rng(seed).standard_normal((2, 3))} for seed in range(3)]


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the layer's weight."""

    name: ClassVar[str] = "scale"
    factor: float = 1.0

    def run(self, graph: Graph) -> PassResult:
        assert isinstance(graph, SequentialGraph)
        stage = graph.steps[0].stage
        assert stage is not None
        graph.steps[0] = replace(graph.steps[0], stage=replace(stage, weight=stage.weight * self.factor))
        return PassResult(True)


def network() -> SequentialGraph:
    weight = np.random.default_rng(9).standard_normal((4, 3))
    affine = Step("bn", "Affine", scale=np.full(4, 2.0), shift=np.zeros(4))
    return SequentialGraph([Step("fc", "Layer", Stage(weight, None, Geometry())), affine], (2, 3))


def test_dumps_are_numbered_through_all_pipelines(tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    dump, graph = DumpIR(folder), network()
    listing = graph.to_text()
    PassManager([FoldBatchNorm(), DropIdentities()], [dump]).run(graph)
    PassManager([Scale(factor=3.0)], [dump]).run(graph)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00-input.txt", "01-fold-batchnorm.txt", "02-drop-identities.txt", "03-scale.txt"]
    assert (folder / "00-input.txt").read_text() == listing + "\n"
    assert (folder / "01-fold-batchnorm.txt").read_text() == (folder / "02-drop-identities.txt").read_text()
    assert (folder / "03-scale.txt").read_text() == graph.to_text() + "\n"


def test_a_new_run_removes_old_dumps_and_nothing_else(tmp_path: Path) -> None:
    for name in ("07-factorize.txt", "notes.txt", "07-Figures.txt"):
        (tmp_path / name).write_text("old")
    PassManager([], [DumpIR(tmp_path)]).run(network())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-input.txt", "07-Figures.txt", "notes.txt"]


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot dump the IR into"):
        PassManager([], [DumpIR(tmp_path / "file" / "ir")]).run(network())


def test_timing_has_a_row_per_pass() -> None:
    timing = Timing()
    PassManager([FoldBatchNorm(), DropIdentities()], [timing]).run(network())
    assert [name for name, _ in timing.rows] == ["fold-batchnorm", "drop-identities"]
    assert all(seconds > 0 for _, seconds in timing.rows)


def test_the_numeric_check_measures_each_pass_against_the_network_it_met() -> None:
    # a linear network scaled by 1 + d moves by a relative L2 of exactly d
    check = NumericCheck(FEEDS, tolerance=0.02)
    PassManager([FoldBatchNorm(), DropIdentities(), Scale(factor=1.01), Scale(factor=1.01)], [check]).run(network())
    assert [name for name, _ in check.rows] == ["fold-batchnorm", "drop-identities", "scale", "scale"]
    moved = [value for _, value in check.rows]
    assert moved[0] < 1e-15 and moved[1] == 0
    assert moved[2:] == pytest.approx([0.01, 0.01], rel=1e-9)


def test_the_numeric_check_stops_beyond_its_tolerance() -> None:
    with pytest.raises(VerificationError) as caught:
        PassManager([FoldBatchNorm(), Scale(factor=1.01)], [NumericCheck(FEEDS, tolerance=0.009)]).run(network())
    assert str(caught.value) == (
        "pass scale (after fold-batchnorm): output y moved by a relative L2 of 0.01, at most 0.009 was allowed"
    )


def test_the_numeric_check_stops_on_values_that_stop_being_finite() -> None:
    with (
        pytest.raises(VerificationError, match=r"pass scale .*output y is finite in other places than before"),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        PassManager([Scale(factor=np.inf)], [NumericCheck(FEEDS, tolerance=0.5)]).run(network())


def test_the_numeric_check_needs_inputs_and_a_sensible_tolerance() -> None:
    with pytest.raises(UsageError, match="at least one"):
        NumericCheck([], tolerance=1e-6)
    with pytest.raises(UsageError, match="between 0 and 1"):
        NumericCheck(FEEDS, tolerance=5.0)
