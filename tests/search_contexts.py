"""Search contexts on small networks, for tests of solvers that look at the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from passes.core.fit import FitProblem
from passes.core.site import Site, Stage
from passes.ranks.context import SearchContext, SiteFactors
from passes.ranks.problem import RankProblem
from passes.registry import FORMATS
from passes.training.data import TrainingSet
from passes.training.layers import StageLayer
from passes.training.network import TrainableNetwork

WIDTH = 5
"""Channels of every layer."""


def sequential(stages: Sequence[Stage], names: Sequence[str], shape: tuple[int, ...]) -> TrainableNetwork:
    """The stages one after another, with a ReLU between two; inputs of ``shape`` without its batch axis."""
    layers: list[torch.nn.Module] = []
    sites, paths = {}, {}
    spatial = shape[1:]
    for index, (stage, name) in enumerate(zip(stages, names, strict=True)):
        paths[name] = str(len(layers))
        layers.extend([StageLayer(stage), torch.nn.ReLU()] if index + 1 < len(stages) else [StageLayer(stage)])
        after = stage.geometry.output_spatial(spatial) if stage.geometry.ndim else ()
        axis = 1 if stage.geometry.ndim else -1
        sites[name] = Site(
            name, "Conv" if stage.geometry.ndim else "Gemm", stage, f"t{index}", f"t{index + 1}",
            (1, stage.in_channels, *spatial), (1, stage.out_channels, *after), axis,
        )  # fmt: skip
        spatial = after
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for path in range(len(layers)):
        x = graph.call_module(str(path), (x,))
    graph.output(x)
    root = torch.nn.Module()
    for path, layer in enumerate(layers):
        root.add_module(str(path), layer)
    return TrainableNetwork(torch.fx.GraphModule(root, graph), ("x",), ("y",), sites, paths)


def plain_factors(network: TrainableNetwork) -> Callable[[str, str], SiteFactors]:
    """Decompositions of the layers' weights alone."""

    def factors(site: str, format: str) -> SiteFactors:
        stage = network.sites[site].stage
        problem = FitProblem(stage.grouped_weight().astype(np.float64))
        return SiteFactors(FORMATS.load(format).decompose(stage.geometry, problem), stage.bias)

    return factors


def context_of(network: TrainableNetwork, problem: RankProblem, data: TrainingSet, seed: int = 0) -> SearchContext:
    """A context whose loss is the predicted error, and whose network costs the sum of its layers."""
    return SearchContext(
        network.clone,
        plain_factors(network),
        data,
        lambda picks: problem.total(tuple(picks), "error"),
        lambda picks: {metric: problem.total(tuple(picks), metric) for metric in problem.budgets},
        seed=seed,
        effort="quick",
    )


def linear_context(problem: RankProblem, samples: int = 8, seed: int = 0) -> SearchContext:
    """A network of square linear layers under the names of the problem's sites, and random labelled samples."""
    rng = np.random.default_rng(seed)
    stages = [
        Stage(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32), rng.standard_normal(WIDTH).astype(np.float32))
        for _ in problem.sites
    ]
    network = sequential(stages, [site.site for site in problem.sites], (WIDTH,))
    inputs = {"x": rng.standard_normal((samples, WIDTH)).astype(np.float32)}
    return context_of(network, problem, TrainingSet.of(inputs, rng.integers(0, WIDTH, samples)), seed)


def with_budgets(problem: RankProblem, budgets: dict[str, float]) -> RankProblem:
    return replace(problem, budgets=budgets)
