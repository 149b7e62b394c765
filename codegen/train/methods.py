"""The methods of training: which layers are replaced by what, what is minimised, and in which phases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from codegen.budget import Budget
from codegen.train.config import TrainConfig
from codegen.train.network import Source
from passes.core.cost import Cost
from passes.core.site import Chain, Site
from passes.errors import UsageError
from passes.graph import Note
from passes.training.data import TrainingSet
from passes.training.elrt import Elrt, given_ranks, scratch_layers, uniform_ranks
from passes.training.factored import LayerScan, put
from passes.training.layers import ChainLayer, StageLayer
from passes.training.objective import CrossEntropy, Objective
from passes.training.options import TrainingOptions
from passes.training.svd_training import (
    SvdLayer,
    SvdTraining,
    check_reachable,
    format_of,
    pruned_at,
    pruned_chains,
    pruned_to,
)
from passes.training.trainer import reestimate_batchnorm

_STATISTICS_SAMPLES = 2048


@dataclass(frozen=True)
class Phase:
    """Training by one recipe. ``enter`` changes the network before it, and says what it did as JSON values."""

    name: str
    options: TrainingOptions
    objective: Objective
    enter: Callable[[], dict[str, Any]] = dict


@dataclass(eq=False)
class Work:
    """What a method works on. ``sites`` are the layers to factorize; ``notes`` says why others are kept; ``warn`` is
    told what the user should know of."""

    config: TrainConfig
    source: Source
    layers: LayerScan
    sites: tuple[Site, ...]
    data: TrainingSet
    notes: list[Note] = field(default_factory=list)
    warn: Callable[[str], None] = lambda text: None

    @property
    def module(self) -> nn.Module:
        return self.source.module

    @property
    def limit(self) -> float | None:
        """Multiply-adds that the network may have."""
        if self.config.macs is None:
            return None
        return Budget.parse("macs", self.config.macs).limit(Cost(macs=self.layers.macs))

    def put(self, chains: Mapping[str, Chain]) -> None:
        """Puts chains into their sites' places; one of a single stage is a dense layer."""
        for site in self.sites:
            if site.name in chains:
                chain = chains[site.name]
                one = StageLayer(chain.stages[0], site.channel_axis) if len(chain) == 1 else None
                put(self.module, self.layers.paths[site.name], one or ChainLayer(chain, site.channel_axis))


class Method(Protocol):
    def phases(self, work: Work) -> tuple[Phase, ...]:
        """Prepares the network and says how it is trained. UsageError where the limit is out of reach."""
        ...


class Dense:
    """The network as it is."""

    def phases(self, work: Work) -> tuple[Phase, ...]:
        options = work.config.options
        return (Phase("train", options, CrossEntropy(options.label_smoothing)),)


class ElrtMethod:
    """Low-rank from the first step; see :mod:`passes.training.elrt`."""

    def phases(self, work: Work) -> tuple[Phase, ...]:
        config, limit = work.config, work.limit
        if limit is not None:
            picks = uniform_ranks(work.layers, work.sites, limit)
        else:
            from codegen.plan_search import read_plan

            assert config.ranks is not None
            picks = given_ranks(work.sites, _by_path(read_plan(config.ranks), work.sites, config.ranks, work.warn))
        sites = tuple(site for site in work.sites if site.name in picks)
        work.put(scratch_layers(sites, picks, config.options.seed))
        for site in work.sites:
            if site.name not in picks or picks[site.name].format == "dense":
                if limit is not None:
                    reason = "kept: no rank within the limit is cheaper"
                else:
                    reason = "kept: dense in the plan" if site.name in picks else "kept: not in the plan"
                work.notes.append(Note(site.name, site.op, reason))
        inner = CrossEntropy(config.options.label_smoothing)
        return (Phase("train", config.options, Elrt(config.orthogonality, inner)),)


class SvdMethod:
    """Full-rank factors, pruned by energy, then fine-tuned; see :mod:`passes.training.svd_training`."""

    def phases(self, work: Work) -> tuple[Phase, ...]:
        config = work.config
        inner = CrossEntropy(config.options.label_smoothing)
        layers = {site.name: SvdLayer(site, config.svd.layout) for site in work.sites}
        if work.limit is not None:
            formats = {site.name: format_of(site, config.svd.layout).name for site in work.sites}
            check_reachable(work.layers, work.sites, formats, work.limit)
        for site in work.sites:
            put(work.module, work.layers.paths[site.name], layers[site.name])
        options = config.options
        epochs = config.finetune_epochs or max(options.epochs // 2, 1)
        finetune = replace(options, epochs=epochs, warmup=0.0, lr=config.finetune_lr or options.lr / 10)
        return (
            Phase("train", options, SvdTraining(config.svd, inner)),
            Phase("finetune", finetune, inner, lambda: self._prune(work, layers)),
        )

    def _prune(self, work: Work, layers: dict[str, SvdLayer]) -> dict[str, Any]:
        if work.limit is not None:
            pruning = pruned_to(work.layers, work.sites, layers, work.limit)
        else:
            assert work.config.energy is not None
            pruning = pruned_at(work.layers, work.sites, layers, work.config.energy)
        work.put(pruned_chains(work.sites, layers, pruning))
        for site in work.sites:
            if pruning.ranks[site.name] is None:
                work.notes.append(Note(site.name, site.op, "kept: its rank is so high that the dense layer is cheaper"))
        # On the samples that the Trainer trains with: the held-out ones judge the network. On the processor: a resumed
        # run must enter the phase with the very same weights, and kernels of GPUs may add up in another order.
        options = work.config.options
        kept, _ = work.data.split(options.held_out, options.seed)
        reestimate_batchnorm(work.module.cpu(), kept, _STATISTICS_SAMPLES)
        return {"energy": pruning.share, "macs": pruning.macs}


METHODS: Mapping[str, Callable[[], Method]] = {"dense": Dense, "elrt": ElrtMethod, "svd": SvdMethod}


def _by_path(
    plan: Mapping[str, tuple[str, tuple[int, ...]]], sites: tuple[Site, ...], path: Path, warn: Callable[[str], None]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A plan's layers by module path; those that are no site here are left out, low-rank ones with a warning.

    UsageError where none is a site: the plan at ``path`` is of another network.

    A plan that was made of the exported network names a layer by its node: layer1.0.conv1 is
    /layer1/layer1.0/conv1/Conv there.
    """
    paths = {site.name: site.name for site in sites}
    for site in sites:
        scopes: list[str] = []
        for part in site.name.split("."):
            scopes.append(f"{scopes[-1]}.{part}" if scopes and part.isdigit() else part)
        for op in ("Conv", "Gemm", "MatMul"):
            paths[f"/{'/'.join(scopes)}/{op}"] = site.name
    if not any(name in paths for name in plan):
        raise UsageError(
            f"--ranks {path}: names none of the layers to factorize ({_few(site.name for site in sites)}); "
            f"it names {_few(plan)}"
        )
    dropped = [name for name, (kind, _) in plan.items() if name not in paths and kind != "dense"]
    if dropped:
        warn(f"--ranks {path}: not among the layers to factorize, so not low-rank here: {', '.join(dropped)}")
    return {paths[name]: pick for name, pick in plan.items() if name in paths}


def _few(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join([*found[:6], *(["..."] if len(found) > 6 else [])]) or "none"
