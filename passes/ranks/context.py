"""The second kind of rank solver: one that looks at the network itself, not at predicted errors alone.

A :class:`passes.ranks.problem.RankSolver` is pure: candidates with costs and predicted errors in, picks out. A
:class:`SearchingSolver` gets the same problem and a :class:`SearchContext` beside it. HALOC trains a supernet in it; a
reinforcement learner such as Galen needs its ``evaluate`` alone. Both end in the same :class:`RankPlan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from passes.core.site import Chain
from passes.ranks.problem import Option, RankPlan, RankProblem

if TYPE_CHECKING:  # torch is loaded by those who use it
    from passes.training.data import TrainingSet
    from passes.training.network import TrainableNetwork


@dataclass(frozen=True, eq=False)
class SearchContext:
    """What such a solver may use.

    ``network()`` is a fresh copy of the dense network, canonical, with the sites of the problem as its layers.
    ``chain(site, option)`` gives an option's factors, fitted as the exact solver's are; ``dense`` has one stage.
    ``data``: the training set where there is one, else the calibration samples; without labels where none are known.
    ``evaluate(picks)``: the loss of the whole network under a plan on the calibration samples, after correction where
    that is on: seconds to a minute each. ``cost(picks)``: by metric, the whole network's costs as the target prices
    them, which need not be the sum. ``progress(done, of, note)`` is called as often as the solver likes.
    """

    network: Callable[[], TrainableNetwork]
    chain: Callable[[str, Option], Chain]
    data: TrainingSet
    evaluate: Callable[[Sequence[int]], float]
    cost: Callable[[Sequence[int]], dict[str, float]]
    progress: Callable[[int, int, str], None]
    seed: int = 0


class SearchingSolver(Protocol):
    """The same problem, context and seed give the same plan on one machine."""

    name: str

    def search(self, problem: RankProblem, context: SearchContext, time_limit_s: float | None = None) -> RankPlan: ...
