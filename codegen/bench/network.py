"""A network opened the way ``lower`` opens it: read, cleaned, priced, ready to be walked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codegen.events import Events
from codegen.memory import Forgetful
from codegen.space import Effort, Selection, Space, build_space
from codegen.target import Target, parse_target
from passes import registry
from passes.core.cost import Cost
from passes.core.site import Chain
from passes.correct import Correction
from passes.drop_dead_code import DropDeadCode
from passes.drop_identities import DropIdentities
from passes.factorize import Factorize
from passes.fold_batchnorm import FoldBatchNorm
from passes.fuse_pointwise import FusePointwise
from passes.manager import PassManager
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Feeds, Stepper


@dataclass(frozen=True, eq=False)
class Opened:
    """``network`` is canonical, ``before`` the price of the network as it was read."""

    network: OnnxGraph
    target: Target
    before: Cost
    stepper: Stepper

    @property
    def input(self) -> str:
        return self.network.inputs[0].name

    def space(self, feeds: Feeds | None, effort: Effort, correction: Correction, events: Events) -> Space:
        """What the solver chooses from; without ``feeds`` the errors are those of the weights."""
        formats = registry.FORMATS.load_all()[0]
        return build_space(
            self.network, self.target.latency, formats, Selection(), self.stepper, feeds, effort, correction, events,
            Forgetful(),
        )  # fmt: skip

    def written(self, chains: dict[str, Chain], path: Path) -> Cost:
        """Writes the network with ``chains`` in it to ``path``; returns its price."""
        rewritten = self.network.clone()
        PassManager([Factorize(chains), FusePointwise(self.target.latency), DropDeadCode()]).run(rewritten)
        rewritten.save(path)
        return self.target.latency.network(rewritten.workload())


def opened(path: Path, target: str | Target) -> Opened:
    """The network in ``path``, for a target or one written as on the command line."""
    resolved = parse_target(target) if isinstance(target, str) else target
    network = OnnxGraph.read(path)
    before = resolved.latency.network(network.workload())
    PassManager([DropIdentities(), FoldBatchNorm(), DropDeadCode()]).run(network)
    return Opened(network, resolved, before, Stepper(network.model(), network.sites().sites))
