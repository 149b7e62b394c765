from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from passes.core.site import Geometry, Stage
from passes.drop_identities import DropIdentities
from passes.errors import InputError, VerificationError
from passes.fold_batchnorm import FoldBatchNorm
from passes.graph import Graph, Note, TensorSpec
from passes.manager import Instrument, Pass, PassManager, PassResult
from tests.sequential_graph import SequentialGraph, Step


@dataclass(frozen=True)
class Misbehaving(Pass):
    """Does to the graph what it is told and reports what it is told."""

    name: ClassVar[str] = "misbehaving"
    action: Callable[[SequentialGraph], None] = lambda graph: None
    modified: bool = True

    def run(self, graph: Graph) -> PassResult:
        self.action(graph)
        return PassResult(self.modified)


def network() -> SequentialGraph:
    rng = np.random.default_rng(0)
    stage = Stage(rng.standard_normal((4, 3, 3, 3)), None, Geometry((3, 3)))
    return SequentialGraph(
        [
            Step("conv", "Layer", stage),
            Step("bn", "Affine", scale=rng.uniform(0.5, 2, 4), shift=rng.standard_normal(4)),
            Step("nothing", "Identity"),
            Step("relu", "Relu"),
        ],
        (1, 3, 8, 8),
    )


def test_passes_run_in_order_and_their_notes_are_collected() -> None:
    graph = network()
    result = PassManager([FoldBatchNorm(), DropIdentities(), DropIdentities()]).run(graph)
    assert [(step.name, r.modified) for step, r in result.outcomes] == [
        ("fold-batchnorm", True),
        ("drop-identities", True),
        ("drop-identities", False),
    ]
    assert result.modified
    assert result.notes == (
        Note("bn", "Affine", "folded into conv"),
        Note("nothing", "Identity", "passes its input on"),
    )
    assert [step.name for step in graph.steps] == ["conv", "relu"]


def test_a_pass_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Misbehaving().modified = False  # type: ignore[misc]


def break_channels(graph: SequentialGraph) -> None:
    wrong = Stage(np.ones((4, 5, 1, 1)), None, Geometry((1, 1)))
    graph.steps[0] = replace(graph.steps[0], stage=wrong)


def rename_output(graph: SequentialGraph) -> None:
    graph.outputs = (replace(graph.outputs[0], name="z"),)


def retype_input(graph: SequentialGraph) -> None:
    graph.inputs = (replace(graph.inputs[0], dtype="float32"),)


def add_output(graph: SequentialGraph) -> None:
    graph.outputs = (*graph.outputs, TensorSpec("extra", "float64", (1,)))


@pytest.mark.parametrize(
    ("action", "modified", "message"),
    [
        (break_channels, True, "conv takes 5 channels, gets 3"),
        (rename_output, True, "outputs changed: y float64[1, 4, 6, 6] became z float64[1, 4, 6, 6]"),
        (retype_input, True, "inputs changed: x float64[1, 3, 8, 8] became x float32[1, 3, 8, 8]"),
        (add_output, True, "outputs changed: 1 became 2"),
        (lambda graph: graph.steps.pop(), False, "reports no change, but the listing went from 3 to 2 lines"),
    ],
)
def test_what_a_pass_must_not_do(action: Callable[[SequentialGraph], None], modified: bool, message: str) -> None:
    graph = network()
    with pytest.raises(VerificationError) as caught:
        PassManager([DropIdentities(), Misbehaving(action, modified)]).run(graph)
    assert str(caught.value) == f"pass misbehaving (after drop-identities): {message}"


def test_a_changed_weight_behind_modified_false_is_found_in_the_listing() -> None:
    def scale(graph: SequentialGraph) -> None:
        stage = graph.steps[0].stage
        assert stage is not None
        graph.steps[0] = replace(graph.steps[0], stage=replace(stage, weight=stage.weight * (1 + 1e-12)))

    with pytest.raises(VerificationError, match=r"reports no change, but line 1 of the listing went from 'conv Layer"):
        PassManager([Misbehaving(scale, False)]).run(network())


def test_an_error_of_ours_keeps_its_class_and_names_the_pass() -> None:
    def refuse(graph: SequentialGraph) -> None:
        raise InputError("the plan is for another network")

    with pytest.raises(InputError) as caught:
        PassManager([Misbehaving(refuse)]).run(network())
    assert str(caught.value) == "pass misbehaving (the first pass): the plan is for another network"
    assert caught.value.exit_code == 4


def test_a_foreign_error_carries_the_pass_as_a_note() -> None:
    def fail(graph: SequentialGraph) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError) as caught:
        PassManager([FoldBatchNorm(), Misbehaving(fail)]).run(network())
    assert caught.value.__notes__ == ["in pass misbehaving (after fold-batchnorm)"]


def test_instruments_are_called_around_each_pass() -> None:
    calls: list[tuple[str, ...]] = []

    class Recorder(Instrument):
        def begin(self, graph: Graph) -> None:
            calls.append(("begin",))

        def before(self, step: Pass, graph: Graph) -> None:
            calls.append(("before", step.name))

        def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
            calls.append(("after", step.name, str(result.modified)))

    PassManager([FoldBatchNorm(), FoldBatchNorm()], [Recorder()]).run(network())
    assert calls == [
        ("begin",),
        ("before", "fold-batchnorm"),
        ("after", "fold-batchnorm", "True"),
        ("before", "fold-batchnorm"),
        ("after", "fold-batchnorm", "False"),
    ]
