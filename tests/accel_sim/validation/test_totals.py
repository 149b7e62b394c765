"""Published totals of other machines against ours: never faster than ours, nor far slower."""

from __future__ import annotations

import pytest

from accel_sim.validation.resnet import resnet_layers
from accel_sim.validation.totals import PublishedTotal, compare_total, published_totals


@pytest.mark.parametrize(
    ("depth", "convolutions", "parameters"), [(18, 20, 11_689_512), (34, 36, 21_797_672), (50, 53, 25_557_032)]
)
def test_layers_are_those_of_the_architecture(depth: int, convolutions: int, parameters: int) -> None:
    """Parameters as torchvision counts them: 2 per channel of each BatchNormalization, and the classifier's biases."""
    layers = resnet_layers(depth)
    assert len(layers) == convolutions + 1
    weights = sum(layer.channels * layer.taps * layer.filters for layer in layers)
    assert weights + 2 * sum(layer.filters for layer in layers[:-1]) + 1000 == parameters


def test_multiply_adds_of_resnet_50_and_the_ends() -> None:
    assert sum(layer.macs for layer in resnet_layers(50)) == pytest.approx(4.09e9, rel=0.001)
    inner = resnet_layers(50, ends=False)
    assert inner == resnet_layers(50)[1:-1]
    assert sum(layer.macs for layer in resnet_layers(18, batch=3)) == 3 * sum(layer.macs for layer in resnet_layers(18))


def test_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="ResNet-20"):
        resnet_layers(20)


@pytest.mark.parametrize("published", published_totals(), ids=lambda published: published.name)
def test_within_a_factor(published: PublishedTotal) -> None:
    """Published cycles are above our floor, above ours, and below two and a half times ours."""
    found = compare_total(published)
    assert found.floor_cycles <= found.cycles <= published.cycles
    assert found.factor < {"Gemmini": 2.4, "VTA": 1.4, "NVDLA": 1.7}[published.name.split()[0]]


def test_resnet_50_at_the_published_utilisation_of_gemmini_is_four_images() -> None:
    """40 % of 256 multiply-adds a cycle."""
    published = next(row for row in published_totals() if row.name.startswith("Gemmini"))
    macs = sum(layer.macs for layer in resnet_layers(50, published.batch))
    assert macs / published.cycles / 256 == pytest.approx(0.4, abs=0.02)
