"""Sequential correction: every layer refitted, in closed form, on what really reaches it.

Two walks over the network advance together, the original and the compressed one. At each site the patches x come
from the compressed walk, the wanted outputs y from the original one, so the fit undoes what the layers before have
lost (asymmetric reconstruction: Zhang et al., TPAMI 2016). Where a residual branch is added behind the site, the
error that arrives over it is put into the target as well, and where the sum is clamped (ReLU), outputs on the flat
side only have to stay there: targets are moved to the nearest value with the same result, and the fit is repeated.
That is majorisation-minimisation: what each sweep lowers is an upper bound of the error behind the clamp, which
counts an output in full where the original is not flat and the fit is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from passes.core.alternate import alternate, refit_tail
from passes.core.factor import FactorFormat, Rank, chain_of, fitted
from passes.core.fit import WIDE, FitProblem, Regression
from passes.core.moments import Moments
from passes.core.patches import outputs_at, patches, sample_rows
from passes.core.site import Array, Chain, Site, Stage, compose
from passes.onnx_stepper import Epilogue, Feeds, Stepper, Stop
from passes.torch_apply import as_array, run_chain


@dataclass(frozen=True)
class Choice:
    """What the plan puts at a site: a format and a rank, or the dense layer (format None)."""

    format: FactorFormat | None = None
    rank: Rank = ()


@dataclass(frozen=True)
class Correction:
    """Options of the sequential correction.

    ``elements`` bounds the patch matrix (samples x K) held at a time; ``ridge`` is relative to the mean eigenvalue of
    the patches' covariance and shrinks towards the original weight; ``sweeps`` counts refits behind a clamp,
    ``rounds`` the alternations of the first fit.
    ``dense`` refits layers that stay dense as well: the same cost, and they absorb part of the error.
    """

    elements: int = 32_000_000
    ridge: float = 1e-3
    sweeps: int = 3
    rounds: int = 6
    dense: bool = True
    skips: bool = True
    seed: int = 0


def correct(
    stepper: Stepper,
    feeds: Feeds,
    choices: Mapping[str, Choice],
    options: Correction,
    roots: Mapping[str, Array] | None = None,
    progress: Callable[[Site], None] = lambda site: None,
) -> tuple[dict[str, Chain], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Fits a chain for every site in ``choices`` (by site name); sites left out stay as they are.

    ``feeds``: input name -> array with all calibration samples. ``roots``: square roots of output metrics by site.
    Returns the chains and the outputs of the original and of the corrected network on the feeds.
    """
    chains: dict[str, Chain] = {}
    rng = np.random.default_rng(options.seed)
    original, compressed = stepper.walk(feeds), stepper.walk(feeds)
    with torch.no_grad():
        try:
            wanted, seen = next(original), next(compressed)
            while True:
                site = wanted.site
                y = run_chain(site, Chain((site.stage,)), wanted.input)
                choice = choices.get(site.name)
                if choice is None or (choice.format is None and not options.dense):
                    chain = Chain((site.stage,))
                else:
                    epilogue = stepper.epilogues[site.output]
                    root = (roots or {}).get(site.name)
                    chain = _fit(wanted, seen, y, epilogue, choice, options, rng, root)
                    chains[site.name] = chain
                progress(site)
                y_seen = run_chain(site, chain, seen.input)
                # both walks hold the same nodes, so they pause and end together
                wanted = _advance(original, y)
                seen = _advance(compressed, y_seen)
        except _Ended as end:
            before = end.outputs
            try:
                compressed.send(y_seen)
            except StopIteration as other:
                return chains, before, other.value
    raise AssertionError("the two walks did not end together")


class _Ended(Exception):
    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self.outputs = outputs


def _advance(walk: object, y: torch.Tensor) -> Stop:
    try:
        return walk.send(y)  # type: ignore[attr-defined,no-any-return]
    except StopIteration as end:
        raise _Ended(end.value) from None


@dataclass(frozen=True, eq=False)
class _Target:
    """Wanted outputs behind the epilogue, at the sampled positions: (g, n, O) each."""

    total: Array  # what the original network has after the addition
    skip: Array | None  # what the compressed network adds
    epilogue: Epilogue

    def initial(self) -> Array:
        return self.total if self.skip is None else self.total - self.skip

    def moved(self, y: Array) -> Array:
        """Targets for the layer, given its present outputs ``y``: on the flat side of the clamp, stay there."""
        now = y if self.skip is None else y + self.skip
        goal = self.total
        low, high = self.epilogue.low, self.epilogue.high
        if low is not None:
            goal = np.where(self.total <= low, np.minimum(now, low), goal)
        if high is not None:
            goal = np.where(self.total >= high, np.maximum(now, high), goal)
        return goal if self.skip is None else goal - self.skip


def _fit(
    wanted: Stop,
    seen: Stop,
    y: torch.Tensor,
    epilogue: Epilogue,
    choice: Choice,
    options: Correction,
    rng: np.random.Generator,
    root: Array | None,
) -> Chain:
    site, stage = wanted.site, wanted.site.stage
    x = as_array(site, seen.input)
    width = int(np.prod(stage.weight.shape[1:])) * stage.geometry.groups
    rows = _rows(site, x.shape, max(options.elements // width, 4 * stage.out_channels), rng)
    columns = patches(x, stage.geometry, rows)
    groups = stage.geometry.groups

    def sampled(value: torch.Tensor) -> Array:
        return outputs_at(as_array(site, value), groups, rows)

    total, skip = sampled(y), None
    if options.skips and wanted.skip is not None and seen.skip is not None and wanted.skip.shape == y.shape:
        total = total + sampled(wanted.skip)
        skip = sampled(seen.skip)
    target = _Target(total, skip, epilogue if skip is not None or epilogue.skip is None else Epilogue())
    moments = Moments.of(columns, target.initial())
    weight = stage.grouped_weight().astype(np.float64)
    flat = weight.reshape(*weight.shape[:2], -1)
    clamps = target.epilogue.low is not None or target.epilogue.high is not None
    regression = Regression(flat, moments, options.ridge)
    stages: tuple[Stage, ...] = ()
    composed, bias = flat, np.zeros(flat.shape[:2])
    sweeps = min(options.sweeps, 1) if flat.shape[-1] > WIDE else options.sweeps
    for sweep in range(1 + (sweeps if clamps else 0)):
        if sweep:
            predicted = np.matmul(columns, composed.swapaxes(1, 2).astype(columns.dtype)) + bias[:, None, :]
            moments = moments.retarget(columns, target.moved(predicted.astype(columns.dtype)))
        goal = regression.fit(moments)
        problem = FitProblem(goal.reshape(weight.shape), regression.gram, root)
        if choice.format is None:
            stages = (replace(stage, weight=goal.reshape(stage.weight.shape), bias=None),)
        elif sweep:
            stages = alternate(refit_tail(stages, problem), problem, rounds=2)
        else:
            decomposed = choice.format.decompose(stage.geometry, problem)
            stages = fitted(decomposed, choice.rank, problem, options.rounds)
        composed = _composed(stages)
        bias = moments.mean_t - np.einsum("gok,gk->go", composed, moments.mean_x)
    if choice.format is None:
        return chain_of("dense", (), stages, bias.reshape(-1))
    return chain_of(choice.format.name, choice.rank, stages, bias.reshape(-1))


def _rows(site: Site, shape: tuple[int, ...], limit: int, rng: np.random.Generator) -> Array:
    if site.stage.geometry.ndim:
        return sample_rows(site.stage.geometry, shape, limit, rng)
    return np.arange(shape[0]) if shape[0] <= limit else np.sort(rng.choice(shape[0], limit, replace=False))


def _composed(stages: tuple[Stage, ...]) -> Array:
    weight = compose(stages)
    return weight.reshape(*weight.shape[:2], -1)
