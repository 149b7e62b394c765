"""The second kind of rank solver: one that looks at the network itself, not at predicted errors alone.

A :class:`passes.ranks.problem.RankSolver` is pure: candidates with costs and predicted errors in, picks out. A
:class:`SearchingSolver` gets the same problem and a :class:`SearchContext` beside it. HALOC trains a supernet in it; a
reinforcement learner such as Galen needs its ``evaluate`` alone. Both end in the same :class:`RankPlan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from passes.core.factor import Decomposition, Rank
from passes.core.site import Array, compose
from passes.ranks.problem import RankPlan, RankProblem

if TYPE_CHECKING:  # torch is loaded by those who use it
    from passes.training.data import TrainingSet
    from passes.training.network import TrainableNetwork


@dataclass(frozen=True, eq=False)
class SiteFactors:
    """One decomposition of a site: the chain of every rank is a slice of it.

    ``mean_x`` (g, K) of the input patches and ``mean_t`` (g, O) of the outputs where calibration data told them: then
    a chain's bias makes up for what its weights lose of the mean. ``bias`` (O,) is the layer's own.
    """

    decomposition: Decomposition
    bias: Array | None = None
    mean_x: Array | None = None
    mean_t: Array | None = None

    def bias_at(self, rank: Rank) -> Array | None:
        """The bias (O,) of the chain of ``rank``; None where there is none."""
        if self.mean_x is None or self.mean_t is None:
            return self.bias
        composed = compose(self.decomposition.stages(rank))
        composed = composed.reshape(*composed.shape[:2], -1)
        return np.asarray(self.mean_t - np.einsum("gok,gk->go", composed, self.mean_x)).reshape(-1)


@dataclass(frozen=True, eq=False)
class SearchContext:
    """What such a solver may use.

    ``network()`` is a fresh copy of the dense network, canonical, with the sites of the problem as its layers; sites
    inside control-flow bodies are none of them. UnsupportedError where the network cannot be trained.
    ``factors(site, format)`` is the site's decomposition in the metric of the calibration data.
    ``data``: the training set where there is one, else the calibration samples; without labels where none are known.
    ``evaluate(picks)``: the loss of the whole network under a plan on the calibration samples, after correction where
    that is on: seconds to a minute each; NaN where the network cannot be walked. ``cost(picks)``: by metric, the whole
    network's costs as the target prices them, which need not be the sum.
    ``progress(done, of, note)`` is called as often as the solver likes. ``device``: as for torch.
    """

    network: Callable[[], TrainableNetwork]
    factors: Callable[[str, str], SiteFactors]
    data: TrainingSet
    evaluate: Callable[[Sequence[int]], float]
    cost: Callable[[Sequence[int]], dict[str, float]]
    progress: Callable[[int, int, str], None] = lambda done, of, note: None
    seed: int = 0
    effort: Literal["quick", "default", "extensive"] = "default"
    device: str = "cpu"


class SearchingSolver(Protocol):
    """The same problem, context and seed give the same plan on one machine's processor, as long as no time limit ends
    the search; on a GPU, where sums differ in their order, it may be another one.

    A plan that carries ``preferences`` is chosen anew from them when the network as a whole turns out to cost more
    than the sum over its layers, or when the emitted files do; one without is then changed as little as possible.
    Neither takes a second search. Needs a budget.
    """

    @property
    def name(self) -> str: ...

    def search(self, problem: RankProblem, context: SearchContext, time_limit_s: float | None = None) -> RankPlan: ...
