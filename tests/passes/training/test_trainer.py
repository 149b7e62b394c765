"""What one run does: updates against torch's own, what is kept, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.errors import InputError, UsageError
from passes.training.augment import Batch
from passes.training.data import TrainingSet, generator
from passes.training.ema import AveragedWeights
from passes.training.objective import CrossEntropy
from passes.training.trainer import Epoch, Step, Trainer, accuracy, reestimate_batchnorm
from tests.passes.training.small_runs import images, normed_network, options, plain_network


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_weights_are_those_of_a_loop_written_out(optimizer: Any) -> None:
    chosen = options(optimizer=optimizer, lr=0.02, augment="none", weight_decay=0.01, clip_norm=0.5)
    network, reference = plain_network(), plain_network()
    steps: list[Step] = []
    epochs: list[Epoch] = []
    run = Trainer(
        network, CrossEntropy(0.1), images(), chosen, keep_best=False, on_step=steps.append, on_epoch=epochs.append
    ).run()

    weights = [p for p in reference.parameters() if p.ndim > 1]
    biases = [p for p in reference.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}]
    kind: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(groups, 0.02, momentum=0.9, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups, 0.02),
        "adamw": lambda: torch.optim.AdamW(groups, 0.02),
    }
    updates = kind[optimizer]()
    kept, held = images().split(0.2, 0)
    losses = []
    for epoch in range(3):
        order = torch.randperm(len(kept), generator=generator(0, 1, epoch))
        for step in range(3):
            index = order[30 * step : 30 * step + 30]
            assert kept.labels is not None
            loss = F.cross_entropy(reference(kept.inputs["x"][index]), kept.labels[index], label_smoothing=0.1)
            for group in updates.param_groups:
                group["lr"] = chosen.lr_at(epoch + step / 3)
            updates.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            updates.step()
            losses.append(float(loss.detach()))
    for one, other in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-5)
    assert [(step.number, step.of, step.epoch) for step in steps] == [(i + 1, 9, i // 3) for i in range(9)]
    assert [epoch.loss for epoch in run.epochs] == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])
    assert run.epochs == epochs and run.best == 2
    assert run.held_out == accuracy(reference, held)


def test_the_best_epoch_is_kept_and_the_later_of_equals() -> None:
    scores, states = iter([0.0, 0.5, 0.5, math.nan, 0.2]), []

    def score(network: nn.Module, held: TrainingSet) -> float:
        assert len(held) == 24
        states.append(copy.deepcopy(network.state_dict()))
        return next(scores)

    network = normed_network()
    run = Trainer(network, CrossEntropy(), images(), options(epochs=5), score=score).run()
    assert run.best == 2 and run.held_out == 0.5
    assert [epoch.held_out for epoch in run.epochs] == [0.0, 0.5, 0.5, -math.inf, 0.2]
    for name, value in network.state_dict().items():
        assert torch.equal(value, states[2][name])
    last = normed_network()
    scores = iter([1.0, 0.0])
    run = Trainer(last, CrossEntropy(), images(), options(epochs=2), score=score, keep_best=False).run()
    assert run.best == 1 and run.held_out == 0.0
    for name, value in last.state_dict().items():
        assert torch.equal(value, states[-1][name])


def test_without_labels_the_objective_judges() -> None:
    class Energy:
        def __call__(self, network: nn.Module, batch: Batch, epoch: float, epochs: float) -> torch.Tensor:
            return network(batch["x"]).square().mean()  # type: ignore[no-any-return]

    data, network = TrainingSet(images().inputs), plain_network()
    run = Trainer(network, Energy(), data, options(augment="none")).run()
    held = data.split(0.2, 0)[1].inputs["x"]
    with torch.no_grad():
        assert run.held_out == pytest.approx(-float(network(held).square().mean()), rel=1e-5)
    assert run.epochs[-1].held_out > run.epochs[0].held_out  # type: ignore[operator]


def test_nothing_held_out_keeps_the_last() -> None:
    run = Trainer(plain_network(), CrossEntropy(), images(), options(held_out=0.0)).run()
    assert run.best == 2 and run.held_out is None


def test_dropout_is_that_of_the_step_and_the_callers_draws_go_on() -> None:
    networks = []
    for seed in (1, 2):
        network = normed_network()
        torch.manual_seed(seed)
        Trainer(network, CrossEntropy(), images(), options()).run()
        after = float(torch.rand(1))
        torch.manual_seed(seed)
        assert float(torch.rand(1)) == after
        networks.append(network.state_dict())
    for name, value in networks[0].items():
        assert torch.equal(value, networks[1][name])


def test_the_mean_of_the_weights_is_what_is_judged_and_kept() -> None:
    network, trained = plain_network(), []
    judged: list[dict[str, torch.Tensor]] = []

    def score(now: nn.Module, held: TrainingSet) -> float:
        judged.append(copy.deepcopy(now.state_dict()))
        return 0.0

    def step(now: Step) -> None:
        trained.append(copy.deepcopy(network.state_dict()))

    start = copy.deepcopy(network.state_dict())
    Trainer(network, CrossEntropy(), images(), options(ema=0.5), score=score, on_step=step).run()
    name, mean = "0.weight", start["0.weight"].double()
    for number, state in enumerate(trained, 1):
        keep = min(0.5, (1 + number) / (10 + number))
        mean = keep * mean + (1 - keep) * state[name].double()
    torch.testing.assert_close(network.state_dict()[name].double(), mean, rtol=1e-5, atol=1e-7)
    assert torch.equal(judged[-1][name], network.state_dict()[name])
    assert not torch.equal(judged[-1][name], trained[-1][name])


def test_whole_numbers_are_not_averaged() -> None:
    network = normed_network()
    mean = AveragedWeights(network, 0.5)
    network[1].num_batches_tracked += 7  # type: ignore[index, operator]
    mean.update(1)
    assert int(mean.mean["1.num_batches_tracked"]) == 7
    with mean.in_place():
        pass


def test_after_each_epoch_the_network_may_be_changed() -> None:
    seen = []

    def prune(network: nn.Module, epoch: int) -> None:
        seen.append(epoch)
        with torch.no_grad():
            network[0].weight[0].zero_()  # type: ignore[index]

    network = plain_network()
    Trainer(network, CrossEntropy(), images(), options(), after_epoch=prune).run()
    assert seen == [0, 1, 2]
    assert not network[0].weight[0].any() and bool(network[0].weight[1].any())  # type: ignore[index]
    with pytest.raises(UsageError, match="ema does not go with"):
        Trainer(network, CrossEntropy(), images(), options(ema=0.9), after_epoch=prune).run()


def test_runs_that_cannot_start() -> None:
    with pytest.raises(UsageError, match="augment is 'cutout'; there are: none, flip, crop_flip"):
        Trainer(plain_network(), CrossEntropy(), images(), options(augment="cutout")).run()
    with pytest.raises(InputError, match="training data: 1 samples, of which 1 are held out"):
        Trainer(plain_network(), CrossEntropy(), images(1), options()).run()
    frozen = plain_network().requires_grad_(False)
    with pytest.raises(InputError, match="no parameter that could be trained"):
        Trainer(frozen, CrossEntropy(), images(), options()).run()


def test_a_class_that_the_network_does_not_know() -> None:
    data = images()
    assert data.labels is not None
    with pytest.raises(InputError, match="a label is 5, the network scores 3 classes"):
        Trainer(plain_network(), CrossEntropy(), TrainingSet(data.inputs, data.labels + 3), options()).run()


def test_a_weight_that_is_no_number_is_divergence_too() -> None:
    def spoil(step: Step) -> None:
        if step.number == 3:  # after the last step of the epoch: no loss sees it
            with torch.no_grad():
                network[0].weight[0, 0, 0, 0] = math.inf  # type: ignore[index]

    network = plain_network()
    with pytest.raises(InputError, match="diverged in epoch 1: a weight is no number; lower the lr"):
        Trainer(network, CrossEntropy(), images(), options(), on_step=spoil).run()


def test_bfloat16_computes_coarser_and_keeps_its_weights_in_float32() -> None:
    coarse, fine = plain_network(), plain_network()
    Trainer(coarse, CrossEntropy(), images(), options(precision="bf16")).run()
    Trainer(fine, CrossEntropy(), images(), options(precision="fp32")).run()
    for one, other in zip(coarse.parameters(), fine.parameters(), strict=True):
        assert one.dtype == torch.float32 and not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.02)


def test_a_compiler_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def broken(module: Any, *given: Any, **named: Any) -> Any:
        def call(*batch: Any) -> Any:
            raise TorchDynamoException("no C++ compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    notes: list[str] = []
    compiled, plain = normed_network(), normed_network()
    Trainer(compiled, CrossEntropy(), images(), options(compile=True), on_note=notes.append).run()
    Trainer(plain, CrossEntropy(), images(), options()).run()
    assert notes == ["torch.compile failed, training goes on without it: no C++ compiler here"]
    for name, value in compiled.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_data_that_have_no_room_on_the_device_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = normed_network(), normed_network()
    Trainer(small, CrossEntropy(), images(), options()).run()
    asked: list[int] = []
    monkeypatch.setattr("passes.training.trainer.has_room", lambda size, device: bool(asked.append(size)))
    Trainer(large, CrossEntropy(), images(), options()).run()
    assert asked == [120 * (3 * 8 * 8 * 4 + 8)]
    for name, value in small.state_dict().items():
        assert torch.equal(value, large.state_dict()[name])


def test_accuracy_counts() -> None:
    data, network = images(37), normed_network()
    assert data.labels is not None
    network.eval()
    with torch.no_grad():
        right = int((network(data.inputs["x"]).argmax(1) == data.labels).sum())
    network.train()
    assert accuracy(network, data, batch=10) == right / 37
    with pytest.raises(ValueError, match="needs labels"):
        accuracy(network, TrainingSet(data.inputs))


def test_statistics_are_the_mean_over_the_first_samples() -> None:
    """Of the convolution's output, computed here with NumPy; dropout has no part in it."""
    network = nn.Sequential(nn.Dropout(0.5), *normed_network()[:2])  # type: ignore[index]
    momentum, data = 0.3, images(70)
    network[2].momentum = momentum
    network[2].running_mean.fill_(5.0)
    reestimate_batchnorm(network, data, 45, batch=20)
    with torch.no_grad():
        y = network[1](data.inputs["x"][:40]).numpy()  # the rest of 5 is no batch
    parts = [y[:20], y[20:]]
    np.testing.assert_allclose(
        network[2].running_mean, np.mean([p.mean((0, 2, 3)) for p in parts], 0), rtol=1e-4, atol=1e-6
    )
    unbiased = [p.transpose(1, 0, 2, 3).reshape(6, -1).var(1, ddof=1) for p in parts]
    np.testing.assert_allclose(network[2].running_var, np.mean(unbiased, 0), rtol=1e-4)
    assert network[2].momentum == momentum and not network.training
