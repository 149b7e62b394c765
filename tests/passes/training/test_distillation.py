"""The objective of recovery against formulas written out in NumPy, and what it looks at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from passes.core.site import Geometry, Site, Stage
from passes.errors import InputError
from passes.training.data import TrainingSet
from passes.training.distillation import Distillation, alignment, scores_kind, tapped
from passes.training.layers import StageLayer
from passes.training.network import TrainableNetwork


class Given(nn.Module):
    """Answers with what it was made with."""

    def __init__(self, *outputs: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.outputs = tuple(torch.from_numpy(o) for o in outputs)

    def forward(self, x: torch.Tensor) -> Any:
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def loss(found: list[Any], wanted: list[Any], kind: str, labels: Any = None, **options: Any) -> float:
    settings = {"temperature": 1.0, "alpha": 0.0, "beta": 0.0, "label_smoothing": 0.0, **options}
    objective = Distillation(Given(*wanted), 1, kind, **settings)  # type: ignore[arg-type]
    batch = {"x": torch.zeros(len(found[0]))}
    if labels is not None:
        batch["labels"] = torch.from_numpy(labels)
    return float(objective(Given(*found), batch, 0.0, 1.0))


def test_soft_scores_labels_and_features_add_up_as_written() -> None:
    rng = np.random.default_rng(0)
    found, wanted = rng.standard_normal((2, 6, 5))
    feature, like = rng.standard_normal((2, 6, 3, 4, 4))
    labels = rng.integers(0, 5, 6)
    t, s = wanted / 3.0, found / 3.0
    kl = (softmax(t, 1) * (log_softmax(t, 1) - log_softmax(s, 1))).sum(1).mean() * 9.0
    smoothed = 0.9 * np.eye(5)[labels] + 0.1 / 5
    ce = -(smoothed * log_softmax(found, 1)).sum(1).mean()
    apart = (np.square(feature - like).sum((1, 2, 3)) / np.square(like).sum((1, 2, 3))).mean()
    made = loss(
        [found, feature], [wanted, like], "logits", labels, temperature=3.0, alpha=0.7, beta=0.4, label_smoothing=0.1
    )
    assert made == pytest.approx(kl + 0.7 * ce + 0.4 * apart, rel=1e-5)
    assert loss([wanted, like], [wanted, like], "logits", beta=1.0) == pytest.approx(0.0, abs=1e-6)


def test_probabilities_are_compared_as_the_logits_that_they_came_from() -> None:
    rng = np.random.default_rng(1)
    found, wanted = rng.standard_normal((2, 6, 5))
    labels = rng.integers(0, 5, 6)
    options = {"temperature": 2.0, "alpha": 0.5}
    plain = loss([found], [wanted], "logits", labels, **options)
    assert loss([softmax(found, 1)], [softmax(wanted, 1)], "probabilities", labels, **options) == pytest.approx(
        plain, rel=1e-5
    )


def test_values_are_compared_by_their_relative_error() -> None:
    rng = np.random.default_rng(2)
    found, wanted = rng.standard_normal((2, 6, 3, 7))
    expected = (np.square(found - wanted).sum((1, 2)) / np.square(wanted).sum((1, 2))).mean()
    assert loss([found], [wanted], "values", np.zeros(6, np.int64), alpha=9.0) == pytest.approx(expected, rel=1e-5)


def test_a_sample_that_is_nearly_zero_counts_ten_times_at_most() -> None:
    rng = np.random.default_rng(5)
    found, wanted = rng.standard_normal((2, 6, 3, 7))
    feature, like = rng.standard_normal((2, 6, 4))
    wanted[0], like[1] = 1e-9, 0.0
    samples = TrainingSet.of({"x": np.zeros((6, 1), np.float32)})
    expected = 0.0
    for a, b in ((found, wanted), (feature, like)):
        gaps, norms = (np.square(x).reshape(6, -1).sum(1) for x in (a - b, b))
        expected += (gaps / np.maximum(norms, 0.1 * norms.mean())).mean()
    made = loss([found, feature], [wanted, like], "values", beta=1.0, samples=samples)
    assert made == pytest.approx(expected, rel=1e-5)


def test_the_gradients_of_a_batch_s_parts_average_to_the_whole_one_s() -> None:
    """Samples of very different size, as several processes would share them."""
    torch.manual_seed(0)
    teacher, network = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(6, 4) * torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0, 100.0])[:, None]
    objective = Distillation(
        teacher, 1, "values", temperature=1.0, alpha=0.0, beta=0.0, label_smoothing=0.0, samples=TrainingSet({"x": x})
    )

    def gradient(part: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(objective(network, {"x": part}, 0.0, 1.0), [network.weight])
        return found

    torch.testing.assert_close((gradient(x[:2]) * 2 + gradient(x[2:]) * 4) / 6, gradient(x), rtol=1e-5, atol=1e-7)


def test_what_the_output_is_told_from_what_it_says() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 5)).astype(np.float32)
    data = TrainingSet.of({"x": np.zeros((4, 1), np.float32)}, np.array([0, 1, 2, 4]))
    assert scores_kind(Given(logits), data) == "logits"
    assert scores_kind(Given(softmax(logits, 1)), data) == "probabilities"
    assert scores_kind(Given(logits.reshape(4, 5, 1, 1)), data) == "values"
    assert scores_kind(Given(logits[:, :1]), data) == "values"
    with pytest.raises(InputError, match="labels run from 0 to 4, but the network tells 4 classes apart"):
        scores_kind(Given(logits[:, :4]), data)


class InPlace(nn.Module):
    """a -> relu, in place -> b (stride 2) -> c, whose input is added to in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(4)

        def conv(stride: int) -> StageLayer:
            geometry = Geometry((3, 3), (stride, stride), (1, 1), (1, 1, 1, 1))
            return StageLayer(Stage(rng.standard_normal((2, 2, 3, 3)).astype(np.float32), None, geometry))

        self.a, self.b, self.c = conv(1), conv(2), conv(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu_(self.a(x))
        z = self.b(y)
        out: torch.Tensor = self.c(z)
        total: torch.Tensor = z.add_(1.0) + out
        return total


def in_place() -> TrainableNetwork:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified: str) -> bool:
            return isinstance(m, StageLayer)

    module = InPlace()
    traced = torch.fx.GraphModule(module, Tracer().trace(module))
    sites = {}
    for name, read, before, after in (("a", "x", 8, 8), ("b", "y", 8, 4), ("c", "z", 4, 4)):
        stage = getattr(module, name).stage()
        sites[name] = Site(name, "Conv", stage, read, f"{name}_out", (1, 2, before, before), (1, 2, after, after), 1)
    return TrainableNetwork(traced, ("x",), ("out",), sites, {name: name for name in sites})


def test_features_are_kept_as_the_layer_read_them() -> None:
    network = in_place()
    x = torch.randn(2, 2, 8, 8)
    y = torch.relu(network.layer("a")(x))
    z = network.layer("b")(y)
    made = tapped(network, ["b", "c"])(x)
    torch.testing.assert_close(made[1], y)
    torch.testing.assert_close(made[2], z)
    torch.testing.assert_close(made[0], network.module(x))


def test_features_are_aligned_where_the_resolution_changes() -> None:
    network = in_place()
    assert alignment(network, network, "stages") == [("b", "b")]
    assert alignment(network, network, "all") == [("b", "b"), ("c", "c")]
    assert alignment(network, network, "none") == []
    student = in_place()
    student.sites["first"] = student.sites.pop("b")  # a chain's first stage reads what the layer read
    assert alignment(student, network, "all") == [("first", "b"), ("c", "c")]
