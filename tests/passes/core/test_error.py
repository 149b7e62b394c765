from __future__ import annotations

import numpy as np
import torch

from passes.core.error import fisher_errors, sample_gradients
from passes.core.patches import outputs_at, patches
from passes.core.site import Geometry


def test_sample_gradients_are_torchs() -> None:
    """Per-sample gradients of sum(y * g) for y = conv(x): autograd, one sample at a time."""
    rng = np.random.default_rng(0)
    geometry = Geometry((3, 2), (2, 1), pads=(1, 0, 1, 1), groups=2)
    x, weight = rng.standard_normal((3, 4, 5, 5)), torch.from_numpy(rng.standard_normal((6, 2, 3, 2)))
    padded = torch.nn.functional.pad(torch.from_numpy(x), (0, 1, 1, 1))
    wanted, gradients = [], []
    for sample in range(3):
        own = weight.clone().requires_grad_()
        y = torch.conv2d(padded[sample : sample + 1], own, None, (2, 1), 0, 1, 2)
        upstream = rng.standard_normal(y.shape)
        (y * torch.from_numpy(upstream)).sum().backward()
        wanted.append(own.grad.numpy().reshape(2, 3, -1))
        gradients.append(upstream)
    upstream = np.concatenate(gradients)
    rows = np.arange(upstream.size // 6)
    found = sample_gradients(patches(x, geometry, rows), outputs_at(upstream, 2, rows), 3)
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-11, atol=1e-11)


def test_fisher_errors_are_the_divergence_of_a_small_change() -> None:
    """A linear softmax classifier, whose expectation over labels is written out and whose KL is computed exactly."""
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((40, 5)), rng.standard_normal((3, 5))

    def log_probabilities(w: np.ndarray) -> np.ndarray:
        z = x @ w.T
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    likely = log_probabilities(weight)
    # one score for each sample and label, d log p(label) / d weight = (1[label] - p) x', weighted by the label's
    # probability: with the weights under the mean's square root, the mean of squares is the expectation
    residual = np.eye(3)[None] - np.exp(likely)[:, None, :]
    own = residual[..., None] * x[:, None, None, :] * np.sqrt(3 * np.exp(likely))[..., None, None]
    scores = own.reshape(120, 1, 3, 5)
    deltas = 1e-3 * rng.standard_normal((4, 1, 3, 5))
    found = fisher_errors(deltas, scores)
    for delta, estimate in zip(deltas, found, strict=True):
        other = log_probabilities(weight + delta[0])
        divergence = float((np.exp(likely) * (likely - other)).sum(axis=1).mean())
        np.testing.assert_allclose(estimate, divergence, rtol=2e-2)  # the third order of a change of 1e-3


def test_fisher_errors_grow_with_the_square_of_the_change() -> None:
    rng = np.random.default_rng(2)
    scores, delta = rng.standard_normal((10, 2, 3, 4)), rng.standard_normal((2, 3, 4))
    one, two, none = fisher_errors([delta, 2 * delta, 0 * delta], scores)
    np.testing.assert_allclose(two, 4 * one, rtol=1e-12)
    assert none == 0.0 and one > 0
