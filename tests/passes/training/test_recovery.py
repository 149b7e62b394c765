"""Recovery of a compressed network: it gets better, or stays what it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.digits_data import digits
from passes import registry
from passes.core.factor import chain_of
from passes.core.fit import FitProblem
from passes.errors import InputError
from passes.fold_batchnorm import FoldBatchNorm
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_module import to_trainable
from passes.training.data import TrainingSet
from passes.training.evaluation import accuracy
from passes.training.layers import ChainLayer
from passes.training.network import TrainableNetwork
from passes.training.options import TrainingOptions
from passes.training.recovery import NotTrainedError, RecoveryOptions, recover

pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")

DIGITS = Path(__file__).parents[3] / "examples" / "digits.onnx"
OPTIONS = RecoveryOptions(TrainingOptions(epochs=3, batch=64, lr=0.03, precision="fp32", held_out=0.1))


@pytest.fixture(scope="module")
def teacher() -> TrainableNetwork:
    graph = OnnxGraph.read(DIGITS)
    PassManager([FoldBatchNorm()]).run(graph)
    return to_trainable(graph)


def student(teacher: TrainableNetwork, rank: int = 3) -> TrainableNetwork:
    network = teacher.clone()
    tucker = registry.FORMATS.load("tucker2")
    for name, site in network.sites.items():
        if site.stage.geometry.ndim == 2 and site.stage.in_channels > 1:
            problem = FitProblem(site.stage.grouped_weight().astype(np.float64))
            stages = tucker.decompose(site.stage.geometry, problem).stages((rank, rank))
            network.put(name, ChainLayer(chain_of("tucker2", (rank, rank), stages, site.stage.bias)))
    return network


def data(part: str, labels: bool = True) -> TrainingSet:
    x, y = digits(part)
    return TrainingSet.of({"image": x}, y if labels else None)


def state(network: TrainableNetwork) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.module.state_dict().items()}


def test_a_compressed_network_recovers(teacher: TrainableNetwork) -> None:
    network, kept = student(teacher), state(teacher)
    test = data("test")
    before = accuracy(network.module, test)
    epochs: list[int] = []
    said: list[tuple[str, float, float | None]] = []
    found = recover(
        network,
        teacher,
        data("train"),
        OPTIONS,
        on_epoch=lambda epoch: epochs.append(epoch.number),
        on_start=lambda measure, start, dense: said.append((measure, start, dense)),
    )
    assert before < 0.5 and accuracy(network.module, test) > before + 0.2
    assert epochs == [0, 1, 2] and not found.kept_start
    assert said == [("accuracy", found.before, found.teacher)] and found.teacher is not None and found.teacher > 0.95
    assert found.after == max(e.held_out for e in found.run.epochs if e.held_out is not None) > found.before
    assert (found.samples, found.held_out) == (970, 108)
    assert all(isinstance(network.layer(n), type(student(teacher).layer(n))) for n in network.layers)
    assert all(torch.equal(value, kept[name]) for name, value in teacher.module.state_dict().items())


def test_without_labels_the_outputs_come_nearer(teacher: TrainableNetwork) -> None:
    network, train = student(teacher), data("train", labels=False)
    test = data("test").inputs["image"]
    with torch.no_grad():
        wanted, before = teacher.module.eval()(test), network.module.eval()(test)
    found = recover(network, teacher, train, OPTIONS)
    with torch.no_grad():
        after = network.module.eval()(test)
    assert found.measure == "-error" and found.teacher is None and found.after > found.before
    assert float((after - wanted).norm()) < 0.9 * float((before - wanted).norm())


def test_what_no_epoch_betters_stays_what_it_was(teacher: TrainableNetwork) -> None:
    """The student is the dense network itself: there is nothing to gain, and a high learning rate leads away."""
    network = teacher.clone()
    before = state(network)
    options = replace(OPTIONS, training=replace(OPTIONS.training, epochs=1, lr=0.5, clip_norm=1.0))
    found = recover(network, teacher, data("train", labels=False), options)
    assert found.kept_start and found.after == found.before
    assert all(torch.equal(value, before[name]) for name, value in network.module.state_dict().items())


def test_a_tie_keeps_the_start(teacher: TrainableNetwork) -> None:
    """Steps this small change no answer: the accuracy is the same, and so is every bit of the weights."""
    network = student(teacher)
    before = state(network)
    options = replace(OPTIONS, training=replace(OPTIONS.training, epochs=1, lr=1e-12))
    found = recover(network, teacher, data("train"), options)
    assert found.run.held_out == found.before == found.after and found.kept_start
    assert all(torch.equal(value, before[name]) for name, value in network.module.state_dict().items())


def test_divergence_is_told_from_a_file_that_cannot_be_written(teacher: TrainableNetwork, tmp_path: Path) -> None:
    network, train = student(teacher), data("train")
    before = state(network)
    wild = replace(OPTIONS, training=replace(OPTIONS.training, epochs=1, lr=1e30))
    with pytest.raises(NotTrainedError, match="training diverged in epoch 1"):
        recover(network, teacher, train, wild)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be") as caught:
        recover(network, teacher, train, OPTIONS, tmp_path / "file")
    assert not isinstance(caught.value, NotTrainedError)
    assert all(torch.equal(value, before[name]) for name, value in network.module.state_dict().items())


def test_a_run_that_was_stopped_ends_like_one_that_was_not(teacher: TrainableNetwork, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: object) -> None:
        raise Stop

    train = data("train")
    options = replace(OPTIONS, training=replace(OPTIONS.training, epochs=2))
    whole, parted = student(teacher), student(teacher)
    recover(whole, teacher, train, options)
    with pytest.raises(Stop):
        recover(parted, teacher, train, options, tmp_path, on_epoch=stop)
    start = state(student(teacher))
    assert all(torch.equal(value, start[name]) for name, value in parted.module.state_dict().items())
    recover(parted, teacher, train, options, tmp_path)
    assert all(torch.equal(value, whole.module.state_dict()[name]) for name, value in state(parted).items())


def test_what_cannot_be_trained_on_is_refused(teacher: TrainableNetwork) -> None:
    train = data("train")
    labels = train.labels
    assert labels is not None
    with pytest.raises(InputError, match="labels run from 10 to 19, but the network tells 10 classes apart"):
        recover(student(teacher), teacher, TrainingSet(train.inputs, labels + 10), OPTIONS)
    one = TrainingSet({"image": train.inputs["image"][:1]})
    with pytest.raises(NotTrainedError, match="training data"):
        recover(student(teacher), teacher, one, OPTIONS)
    nothing_held = replace(OPTIONS, training=replace(OPTIONS.training, held_out=0.0))
    with pytest.raises(NotTrainedError, match="no training samples are held out"):
        recover(student(teacher), teacher, train, nothing_held)
    with pytest.raises(ValueError, match="the temperature must be above 0"):
        RecoveryOptions(temperature=0.0)
