"""What every pass must be and do, for each built-in one on each frontend."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from passes.graph import Graph
from passes.manager import Pass, PassManager
from passes.registry import PASSES
from tests.contracts.test_graph import FRONTENDS, feeds, replace_first, svd_chain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=FRONTENDS)
def graph(request: pytest.FixtureRequest) -> Graph:
    return request.param()


def configured(name: str, graph: Graph) -> Pass:
    """The pass with options that give it something to do on the contract's network."""
    site = graph.sites().sites[0]
    options = {"factorize": {"chains": {site.name: svd_chain(site)}}}
    return PASSES.load(name)(**options.get(name, {}))


@pytest.mark.parametrize("name", PASSES.builtin)
def test_one_pass_one_file_one_name_one_test(name: str) -> None:
    cls = PASSES.load(name)
    stem = name.replace("-", "_")
    assert cls.__module__ == f"passes.{stem}" and cls.name == name
    assert (ROOT / "tests" / "passes" / f"test_{stem}.py").is_file()
    passes = [c for _, c in inspect.getmembers(inspect.getmodule(cls), inspect.isclass) if issubclass(c, Pass)]
    assert [c for c in passes if c.__module__ == cls.__module__] == [cls]


@pytest.mark.parametrize("name", PASSES.builtin)
def test_the_docstring_shows_before_and_after_and_what_is_refused(name: str) -> None:
    doc = inspect.getdoc(inspect.getmodule(PASSES.load(name))) or ""
    title, example, refusals = doc.split("\n\n")[:3]
    assert title.endswith(".")
    assert len(example.splitlines()) == 2 and all(line.startswith("    ") for line in example.splitlines())
    assert "Refuses" in refusals


@pytest.mark.parametrize("name", PASSES.builtin)
def test_options_are_fields_of_a_frozen_dataclass(name: str, graph: Graph) -> None:
    step = configured(name, graph)
    assert dataclasses.is_dataclass(step) and type(step).__dataclass_params__.frozen  # type: ignore[attr-defined]
    before = dict(vars(step))
    PassManager([step]).run(graph)
    assert vars(step) == before, "nothing is kept on a pass between runs"


@pytest.mark.parametrize("name", PASSES.builtin)
def test_it_does_its_work_once(name: str, graph: Graph) -> None:
    step = configured(name, graph)
    first = PassManager([step]).run(graph)
    text = graph.to_text()
    assert first.modified and all(note.node and note.reason for note in first.notes)
    assert not PassManager([step]).run(graph).modified
    assert graph.to_text() == text


@pytest.mark.parametrize("name", PASSES.builtin)
def test_two_copies_of_a_network_end_up_equal(name: str, graph: Graph) -> None:
    copy, step = graph.clone(), configured(name, graph)
    results = [PassManager([step]).run(g).notes for g in (graph, copy)]
    assert results[0] == results[1] and graph.to_text() == copy.to_text()


@pytest.mark.parametrize("name", PASSES.builtin)
def test_a_network_without_anything_to_do_is_left_alone(name: str, graph: Graph) -> None:
    steps = [configured(n, graph) for n in PASSES.builtin if n != "factorize"]
    PassManager(steps).run(graph)
    text = graph.to_text()
    result = PassManager([PASSES.load(name)()]).run(graph)
    assert not result.modified and graph.to_text() == text


def test_the_whole_pipeline_keeps_values(graph: Graph) -> None:
    (reference,) = graph.run(feeds(graph))
    PassManager([configured(name, graph) for name in PASSES.builtin if name != "factorize"]).run(graph)
    PassManager([configured("factorize", graph)]).run(graph)
    (found,) = graph.run(feeds(graph))
    assert abs(found - reference).max() <= 1e-5 * abs(reference).max()


def test_a_chain_that_was_factorized_before_is_not_found_again(graph: Graph) -> None:
    step = configured("factorize", graph)
    replace_first(graph)
    result = PassManager([step]).run(graph)
    assert not result.modified and result.notes[0].reason == "no such site in this network"
