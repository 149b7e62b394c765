"""What a candidate is expected to lose, without running it.

``whitened``: expected squared output error, tr(D G D') for D = W - B, over the output's own energy.
``fisher``: expected Kullback-Leibler divergence of the network's output to second order. With s_n the gradient of the
log-likelihood of a label drawn from the network's own prediction for sample n with respect to the layer's weight,
KL = 1/2 E_n [<D, s_n>^2] (the empirical form of the Fisher quadratic; Amari 1998). It sees where the network is
sensitive and how the errors of one sample's positions add up, which an output norm does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passes.core.site import Array


def sample_gradients(columns: Array, gradients: Array, samples: int) -> Array:
    """Per-sample weight gradients from patches (g, n P, K) and output gradients (g, n P, O): (n, g, O, K).

    Rows are ordered by sample, P positions each.
    """
    groups, rows, width = columns.shape
    per = rows // samples
    x = columns.reshape(groups, samples, per, width)
    y = gradients.reshape(groups, samples, per, -1)
    return np.ascontiguousarray(np.matmul(y.swapaxes(2, 3), x).swapaxes(0, 1))


def fisher_errors(deltas: Sequence[Array] | Array, scores: Array) -> Array:
    """Half the mean squared inner product of each change (C, g, O, K) with the scores (n, g, O, K): (C,)."""
    flat = scores.reshape(len(scores), -1)
    out = np.empty(len(deltas))
    for index, delta in enumerate(deltas):
        inner = flat @ delta.reshape(-1).astype(flat.dtype)
        out[index] = 0.5 * float(np.mean(np.square(inner, dtype=np.float64)))
    return out
