"""A run that was stopped ends with the very weights of one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from passes.errors import InputError
from passes.training import checkpoint
from passes.training.data import TrainingSet
from passes.training.objective import CrossEntropy
from passes.training.trainer import Run, Step, Trainer
from tests.passes.training.small_runs import EVERYTHING, ScaledCrossEntropy, images, normed_network, options

ROOT = Path(__file__).resolve().parents[3]
SGD: dict[str, Any] = {"label_smoothing": 0.1}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(folder: Path | None, changed: dict[str, Any], **given: Any) -> tuple[nn.Module, Run, ScaledCrossEntropy]:
    network, objective = normed_network(), ScaledCrossEntropy()
    run = Trainer(network, objective, images(), options(**changed), folder, **given).run()
    return network, run, objective


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def curve(run: Run) -> list[Any]:
    return [replace(epoch, seconds=0.0) for epoch in run.epochs]


def stop_at(number: int, error: type[BaseException]) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step.number == number:
            raise error

    return on_step


def test_killed_in_mid_epoch_and_resumed(tmp_path: Path) -> None:
    step = 5  # the second of the second epoch
    command = [sys.executable, "-m", "tests.passes.training.killed_child", str(tmp_path), str(step)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    seen: list[int] = []
    network, run, objective = train(tmp_path, EVERYTHING, on_step=lambda s: seen.append(s.number))
    assert seen[0] == step  # the killed step was not saved yet, the one before it was
    whole, reference, of_whole = train(None, EVERYTHING)
    assert_same(network, whole)
    assert torch.equal(objective.scale, of_whole.scale) and float(objective.scale.detach()) != 1.5
    assert curve(run) == curve(reference) and run.best == reference.best


class Crash(Exception):
    pass


@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_resumed_from_any_step_with_sgd(step: int, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path, SGD, on_step=stop_at(step, Crash), checkpoint_s=0.0)
    network, run, _ = train(tmp_path, SGD)
    whole, reference, _ = train(None, SGD)
    assert_same(network, whole)
    assert curve(run) == curve(reference)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    network, run, _ = train(tmp_path, SGD)
    again, same, _ = train(tmp_path, SGD, on_step=stop_at(1, Crash))
    assert_same(network, again)
    assert run == same


def test_an_interrupt_leaves_the_state_between_two_steps(tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.number == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # whoever stops a group of processes may send both

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, EVERYTHING, on_step=interrupt)  # no checkpoint would be due for a minute
    saved = checkpoint.load(tmp_path / "training.pt")
    assert saved is not None and 1 <= saved["epoch"] * 3 + saved["step"] <= 6
    seen: list[int] = []
    network, _, _ = train(tmp_path, EVERYTHING, on_step=lambda s: seen.append(s.number))
    assert seen[0] == saved["epoch"] * 3 + saved["step"] + 1
    assert_same(network, train(None, EVERYTHING)[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_interrupt_is_not_deferred(tmp_path: Path) -> None:
    def insist(step: Step) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second interrupt was swallowed")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, SGD, on_step=insist)
    assert not (tmp_path / "training.pt").exists()


class Described(CrossEntropy):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def describe(self) -> dict[str, Any]:
        return {"weight": self.weight}


def run_of(folder: Path, what: str = "") -> None:
    """The same run every time, but for one thing."""
    data = images(seed=1 if what == "data" else 0)
    if what == "one pixel":
        data.inputs["x"][3, 0, 0, 0] += 1e-3
    Trainer(
        normed_network(seed=1 if what == "weights" else 0),
        Described(2.0 if what == "objective's numbers" else 1.0) if what != "objective" else CrossEntropy(),
        TrainingSet(data.inputs, None if what == "labels" else data.labels),
        options(epochs=1, lr=0.02 if what == "options" else 0.01),
        folder,
        augment=(lambda batch, generator: batch) if what == "augment" else None,
        keep_best=what != "keep_best",
    ).run()


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path)
    run_of(tmp_path)
    expected = {
        "data": "data", "one pixel": "data", "labels": "data", "weights": "weights", "objective": "objective",
        "objective's numbers": "objective", "options": "options", "augment": "augment", "keep_best": "keep_best",
    }  # fmt: skip
    for what, name in expected.items():
        with pytest.raises(InputError, match=rf"another run \({name} differ\); give another folder") as refused:
            run_of(tmp_path, what)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "pickle", "other", "part"])
def test_a_damaged_checkpoint_is_an_error_of_one_line(damage: str, tmp_path: Path) -> None:
    run_of(tmp_path)
    path = tmp_path / "training.pt"
    content = path.read_bytes()
    if damage == "part":
        found = checkpoint.load(path)
        assert found is not None
        del found["optimizer"]
        checkpoint.save(path, found)
    elif damage == "other":
        torch.save({"weight": torch.zeros(2)}, path)
    elif damage == "pickle":
        torch.save({"format": checkpoint.FORMAT, "key": Path("x")}, path)
    else:
        middle = len(content) // 2
        broken = {
            "empty": b"", "cut": content[:middle], "text": b"no checkpoint\n",
            "flipped": content[:40] + bytes(255 - b for b in content[40:400]) + content[400:],
        }  # fmt: skip
        path.write_bytes(broken[damage])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"training\.pt: is no .*checkpoint") as refused:
        run_of(tmp_path)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    checkpoint.save(path, {"x": torch.arange(3)})

    class Unsaved:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"x": torch.arange(5), "y": Unsaved()})
    found = checkpoint.load(path)
    assert found is not None and found["x"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["training.pt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: (Not a directory|File exists)"):
        checkpoint.save(tmp_path / "file" / "training.pt", {})


def test_divergence_names_the_epoch_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Broken(CrossEntropy):
        def __call__(self, network: nn.Module, batch: Any, epoch: float, epochs: float) -> torch.Tensor:
            loss = super().__call__(network, batch, epoch, epochs)
            return loss * float("nan") if epoch >= 1.5 else loss

    with pytest.raises(InputError, match="diverged in epoch 2: the loss is no number; lower the lr"):
        Trainer(normed_network(), Broken(), images(), options(), tmp_path, checkpoint_s=0.0).run()
    saved = checkpoint.load(tmp_path / "training.pt")
    assert saved is not None and (saved["epoch"], saved["step"]) == (1, 2)
    assert all(bool(torch.isfinite(x).all()) for x in saved["module"].values())
    assert np.isfinite(saved["loss"])
