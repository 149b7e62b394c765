"""Walks for their outputs: what a network computes with chains in the places of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from codegen.dataset import Dataset
from passes.core.factor import chain_of, fitted
from passes.core.fit import FitProblem
from passes.core.moments import Moments
from passes.core.site import Array, Chain, Site, compose
from passes.core.streamed import LARGE_BYTES, StreamedSvd, streams
from passes.correct import Choice
from passes.onnx_stepper import Feeds, Stepper, Stop, finish
from passes.torch_apply import run_chain

FeedsOf = Callable[[Dataset], Feeds]
"""How a data set is given to a walk."""


def batched(data: Dataset) -> Feeds:
    """All samples as one batch where every input has a symbolic batch dimension, else sample by sample."""
    return data.feeds if data.dynamic else one_by_one(data)


def one_by_one(data: Dataset) -> Feeds:
    """Each sample as an inference of its own."""
    return list(data.batches(1))


def head(feeds: Feeds, count: int, batch: int = 64) -> list[Mapping[str, Array]]:
    """The first ``count`` samples as a list of batches."""
    if not isinstance(feeds, Mapping):
        return [{name: np.asarray(value) for name, value in part.items()} for part in feeds[:count]]
    size = min(count, *(len(v) for v in feeds.values()))
    return [
        {name: np.asarray(value[start : min(start + batch, size)]) for name, value in feeds.items()}
        for start in range(0, size, batch)
    ]


def outputs_under(stepper: Stepper, feeds: Feeds, chains: Mapping[str, Chain]) -> dict[str, torch.Tensor]:
    """The network's outputs with ``chains`` in the places of their sites."""
    with torch.no_grad():
        return stepper.run(feeds, lambda stop: _under(stop, chains.get(stop.site.name)))


def outputs_under_each(
    stepper: Stepper,
    feeds: Feeds,
    chain_of: Mapping[str, Callable[[], Chain]],
    seen: Callable[[str, dict[str, torch.Tensor]], None],
) -> None:
    """Shows ``seen`` the network's outputs with a chain in the place of one site alone, for each site in ``chain_of``.

    What is before a site is computed once for all, where ``feeds`` is one set of inputs.
    """
    if not isinstance(feeds, Mapping) and len(feeds) > 1:
        for name, chain in chain_of.items():
            seen(name, outputs_under(stepper, feeds, {name: chain()}))
        return

    def at_site(stop: Stop) -> torch.Tensor:
        name = stop.site.name
        if name in chain_of:
            assert stop.branch is not None
            seen(name, finish(stop.branch(_under(stop, chain_of[name]())), _under))
        return _under(stop)

    with torch.no_grad():
        stepper.run(feeds, at_site)


def _under(stop: Stop, chain: Chain | None = None) -> torch.Tensor:
    """What a chain makes of a site's input, or the site itself."""
    return run_chain(stop.site, chain or Chain((stop.site.stage,)), stop.input)


def relative_error(outputs: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """Relative L2 over all floating outputs, each in units of its own norm; the worst one counts."""
    worst = 0.0
    for name, a in reference.items():
        if a.is_floating_point() and a.numel():
            norm = float(a.double().norm())
            worst = max(worst, float((outputs[name].double() - a.double()).norm()) / (norm or 1.0))
    return worst


def plain_chain(site: Site, choice: Choice) -> Chain:
    """The chain by the weights alone; that of a large layer stays in files, as its weight does."""
    assert choice.format is not None
    if site.stage.weight.nbytes >= LARGE_BYTES and streams(choice.format):
        decomposed = StreamedSvd.of(choice.format, site.stage)
        return chain_of(choice.format.name, choice.rank, decomposed.stages(choice.rank), site.stage.bias)
    problem = FitProblem(site.stage.grouped_weight().astype(np.float64))
    stages = choice.format.decompose(site.stage.geometry, problem).stages(choice.rank)
    return chain_of(choice.format.name, choice.rank, stages, site.stage.bias)


def whitened_chain(site: Site, choice: Choice, moments: Moments, ridge: float) -> Chain:
    """The chain fitted to the original layer on the original network's inputs, each layer for itself."""
    assert choice.format is not None
    weight = site.stage.grouped_weight().astype(np.float64)
    problem = FitProblem(weight, moments.ridge(ridge))
    stages = fitted(choice.format.decompose(site.stage.geometry, problem), choice.rank, problem, rounds=6)
    composed = compose(stages).reshape(problem.matrix.shape)
    bias = moments.mean_t - np.einsum("gok,gk->go", composed, moments.mean_x)
    return chain_of(choice.format.name, choice.rank, stages, bias.reshape(-1))
