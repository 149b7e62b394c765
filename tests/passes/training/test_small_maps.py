"""Maps side by side against torch's own convolution: values, gradients, and which convolutions are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.training.data import TrainingSet
from passes.training.objective import CrossEntropy
from passes.training.options import TrainingOptions
from passes.training.small_maps import WEIGHTS, SideBySide, pays, side_by_side
from passes.training.trainer import Trainer


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 1), (1, 3), (5, 3)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (2, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_same_as_torch(kernel: tuple[int, int], size: tuple[int, int], biased: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, *size, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, *kernel, generator=draw, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, generator=draw, dtype=torch.float64, requires_grad=True) if biased else None
    padding = (kernel[0] // 2, kernel[1] // 2)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    wanted = F.conv2d(x, weight, bias, padding=padding)
    found = side_by_side(x, weight, bias, padding)
    torch.testing.assert_close(found, wanted)
    back = torch.randn(wanted.shape, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, back), torch.autograd.grad(wanted, leaves, back))


def test_which_convolutions_are_meant() -> None:
    x, weight = torch.zeros(2, 128, 4, 4, dtype=torch.bfloat16), torch.zeros(128, 128, 3, 3, dtype=torch.bfloat16)
    assert weight.numel() >= WEIGHTS
    meant: tuple[Any, ...] = (x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    assert pays(*meant)

    def but(**other: Any) -> bool:
        names = ("x", "weight", "bias", "stride", "padding", "dilation", "groups")
        return pays(*(other.get(name, value) for name, value in zip(names, meant, strict=True)))

    assert not but(x=x.float())
    assert not but(x=torch.zeros(2, 128, 5, 4, dtype=torch.bfloat16))
    assert not but(weight=weight[:64])
    assert not but(stride=(2, 2))
    assert not but(padding=(0, 0))
    assert not but(padding="same")
    assert not but(padding=(1,))
    assert not but(x=x[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert but(x=x.float(), weight=weight.float())
        assert not but(x=x.double(), weight=weight.double())
    assert not but(dilation=(2, 2), padding=(1, 1))
    assert not but(groups=2)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for every convolution that is computed side by side."""
    taken: list[int] = []

    def taking(*args: Any) -> torch.Tensor:
        taken.append(1)
        return side_by_side(*args)

    monkeypatch.setattr("passes.training.small_maps.side_by_side", taking)
    return taken


def test_a_network_in_autocast_takes_it_and_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 10, 1))
    x = torch.randn(4, 128, 4, 4)
    taken = counted(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = network(x)
        with SideBySide():
            found = network(x)
    assert found.dtype == torch.bfloat16 and len(taken) == 1
    torch.testing.assert_close(found, wanted)
    assert not found.equal(network(x))  # which is float32
    assert len(taken) == 1


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("fp32", False)])
def test_training_in_bf16_takes_it(monkeypatch: pytest.MonkeyPatch, precision: Any, expected: bool) -> None:
    taken = counted(monkeypatch)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4))
    data = TrainingSet({"x": torch.randn(16, 128, 4, 4)}, torch.arange(16) % 4)
    Trainer(network, CrossEntropy(), data, TrainingOptions(epochs=1, batch=8, precision=precision)).run()
    assert bool(taken) is expected
