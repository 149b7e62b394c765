"""The experiments' configurations: each of them can be run, and broken ones say what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from codegen.reproduce import experiment as experiments
from codegen.reproduce.data import SOURCES, Synthetic
from codegen.reproduce.experiment import SCHEDULES, experiment, names, parse
from codegen.reproduce.steps import Settings, lower_config, resolved, train_config
from codegen.train.network import BUILT_IN
from passes.errors import InputError, UsageError
from passes.training.options import TrainingOptions
from tests.onnx_models import normal, onnx_model


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "out", Synthetic(tmp_path), tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "dense.onnx"
    graph = onnx_model("net (float[N,3] x) => (float[N,4] y) {\n y = Gemm (x, w)\n}", {"w": normal(3, 4)})
    path.write_bytes(graph.SerializeToString())
    return path


def test_there_are_those_of_the_tables() -> None:
    assert {
        "dense-resnet20", "dense-vgg16", "resnet20-macs", "vgg16-macs", "resnet20-latency", "solvers", "elrt-resnet20",
        "svd-resnet20", "self-test",
    } <= set(names())  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("epochs", [None, 1])
def test_every_step_is_a_run_that_its_command_accepts(
    name: str, schedule: experiments.ScheduleName, epochs: int | None, settings: Settings, model: Path
) -> None:
    plan = experiment(name, schedule)
    settings = Settings(settings.output, settings.data, settings.models, None, epochs)
    assert plan.data in SOURCES and (plan.network in BUILT_IN or plan.network == "tiny")
    for step in plan.steps:
        options = resolved(step, settings)
        if step.kind == "lower":
            config = lower_config(step, options, 5, model, settings.output / "x", settings)
            assert config.seed == 5 and config.eval is None and config.parsed_budgets
            assert config.epochs == ((epochs or options["epochs"]) if step.recover else None)
            assert (config.train is None, config.calib is None) == (not step.recover, step.recover)
        elif step.kind != "given":
            given = options if step.ranks_of is None else {**options, "ranks": model}
            trained = train_config(plan, step, given, 5, settings.output / "x", settings)
            assert trained.eval is None and trained.options.seed == 5
            assert trained.options.epochs == (epochs or options["epochs"])


def test_all_compare_with_one_dense_recipe() -> None:
    recipes = {name: experiment(name).steps[0] for name in names() if experiment(name).steps[0].kind == "dense"}
    for name, step in recipes.items():
        if name != "self-test":
            assert step == recipes[f"dense-{experiment(name).network}"]


def test_the_short_dense_resnet20() -> None:
    options = experiment("dense-resnet20", "short").steps[0].options
    assert TrainingOptions(**options) == TrainingOptions(
        epochs=30, batch=128, lr=0.1, weight_decay=5e-4, warmup=1.0, augment="crop_flip", held_out=0.04, seed=0
    )


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown experiment 'vgg16-mac' \(did you mean vgg16-macs\?\)"):
        experiment("vgg16-mac")


GOOD = """
title = "t"
data = "synthetic"
network = "tiny"
[[steps]]
name = "dense"
kind = "dense"
options = { epochs = 2 }
short = { epochs = 1, lr = 0.5 }
[[steps]]
name = "low"
kind = "lower"
"""


def test_a_schedules_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "read", lambda name: parse(name, GOOD))
    assert experiment("x", "short").steps[0].options == {"epochs": 1, "lr": 0.5}
    assert experiment("x", "full").steps[0].options == {"epochs": 2}
    assert experiment("x", "full").seeds == (0, 1, 2) and experiment("x", "short").seeds == (0,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title", "tilte", "experiment x: title: Field required"),
        ('"t"', '"t', "experiment x: Illegal character"),
        ('kind = "lower"', 'kind = "low"', "steps.1.kind: Input should be 'dense'"),
        ('kind = "lower"', 'kind = "lower"\nof = "sparse"', "lowers 'sparse', which is no step before it"),
        ('kind = "lower"', 'kind = "given"', "a file belongs to kind 'given'"),
        (
            'kind = "lower"',
            'kind = "elrt"\nranks_of = "dense"',
            "ranks_of is for kind 'elrt', and names a lowered step",
        ),
        ('kind = "lower"', 'kind = "svd"\nranks_of = "low"', "ranks_of is for kind 'elrt', and names a lowered step"),
        ('kind = "lower"', 'kind = "elrt"\nrecover = false', "recover belongs to kind 'lower'"),
        ('name = "low"', 'name = "dense"', "two steps are called 'dense'"),
        ('name = "dense"', 'name = "first"', "the first step is 'first', expected 'dense'|lowers 'dense'"),
        ('data = "synthetic"', 'data = "mnist"', "experiment x: data:"),
    ],
)
def test_a_broken_configuration_is_told_in_a_line(old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        parse("x", GOOD.replace(old, new, 1))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("epoch = 1", "step dense: there is no option 'epoch'"),
        ("lr = -1.0", "step dense: lr is -1.0"),
        ("svd = { rank = 1 }", "step dense: there is no option 'rank'"),
    ],
)
def test_options_that_a_step_does_not_have(
    options: str, message: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GOOD.replace("epochs = 1, lr = 0.5", options)
    monkeypatch.setattr(experiments, "read", lambda name: parse(name, text))
    plan = experiment("x")
    with pytest.raises(InputError, match=re.escape(message)):
        train_config(plan, plan.steps[0], resolved(plan.steps[0], settings), 0, settings.output, settings)


def test_a_recipe_that_is_shared_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = GOOD.replace("options = { epochs = 2 }\nshort = { epochs = 1, lr = 0.5 }", 'like = "other"')
    texts: Mapping[str, str] = {"x": shared, "other": GOOD}
    monkeypatch.setattr(experiments, "read", lambda name: parse(name, texts[name]))
    assert experiment("x").steps[0] == experiment("other").steps[0]
    assert experiment("x").steps[0].owner == "other"
    broken: list[tuple[dict[str, Any], str]] = [
        ({"x": shared.replace("tiny", "vgg16")}, "about another network"),
        ({"x": shared.replace('like = "other"', 'like = "other"\nshort = { lr = 1.0 }')}, "has options of its own"),
        ({"other": GOOD.replace('"dense"\noptions', '"elrt"\noptions')}, "has no step 'dense' of kind dense"),
    ]
    for changed, message in broken:
        monkeypatch.setattr(experiments, "read", lambda name, of={**texts, **changed}: parse(name, of[name]))
        with pytest.raises(InputError, match=message):
            experiment("x")
