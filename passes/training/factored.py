"""The layers of a torch network that may be trained as factors, and what they become again at the end.

Training from scratch needs no graph: a layer that is a module of its own and is called once is replaced in place, in
the user's own module, so that whatever the network does around its layers (control flow, dropout, BatchNorm) stays
the network's business. Which layers those are is seen on one forward pass.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.flop_counter import FlopCounterMode

from passes.core.cost import chain_work
from passes.core.site import Chain, Site, Stage, compose
from passes.errors import UnsupportedError, UsageError
from passes.graph import Note
from passes.training.layers import ChainLayer, StageLayer, stage_of

Tensor = torch.Tensor

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass(frozen=True)
class LayerScan:
    """The layers of a network in the order in which they run.

    ``sites``: those that may be replaced, with shapes of one sample. ``kept``: the others, each with the reason.
    ``macs``: multiply-adds of the whole network on one sample, counted by torch. ``paths``: the module of each site.
    """

    sites: tuple[Site, ...]
    kept: tuple[Note, ...]
    macs: int
    paths: Mapping[str, str]

    def total_macs(self, chains: Mapping[str, int]) -> int:
        """Multiply-adds of the network with chains of these MACs in the place of the sites that are named."""
        return self.macs + sum(macs - site_macs(self.site(name)) for name, macs in chains.items())

    def site(self, name: str) -> Site:
        """KeyError for an unknown name."""
        return next(site for site in self.sites if site.name == name)


def scan(module: nn.Module, inputs: Sequence[Tensor], called: Mapping[str, str] | None = None) -> LayerScan:
    """Runs ``module`` on one sample, in inference mode, and looks at what it calls.

    A layer is named by its path in the module, or as ``called`` has it.

    A layer is kept where it is called twice or never (a function may use its weight), shares its weight, carries hooks
    or parametrizations, is grouped or transposed, or is a subclass with a forward of its own. UnsupportedError where
    the network does not run on ``inputs``.
    """
    found = {path: layer for path, layer in module.named_modules(remove_duplicate=False) if _is_layer(layer)}
    paths = Counter(id(layer) for layer in found.values())
    reasons = {path: _reason(path, layer, paths[id(layer)]) for path, layer in found.items()}
    owners = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    names = {id(layer): path for path, layer in found.items()}
    shown = called or {}
    calls: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def note(layer: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> None:
        calls.setdefault(names[id(layer)], []).append((tuple(taken[0].shape), tuple(given.shape)))

    macs = _watched(module, inputs, list(found.values()), note)
    sites, kept = [], []
    for path in [*calls, *(path for path in found if path not in calls)]:
        layer = found[path]
        seen = calls.get(path, [])
        reason = reasons[path]
        if reason is None and any(owners[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            reason = "kept: it shares its weight with another module"
        if reason is None and len(seen) != 1:
            reason = f"kept: it is called {len(seen)} times" if seen else "kept: it is never called as a module"
        stage = stage_of(layer) if reason is None else None
        if isinstance(stage, Stage):
            taken, given = seen[0]
            axis = layer.channel_axis if isinstance(layer, StageLayer) else -1
            axis = 1 if stage.geometry.ndim else axis
            sites.append(Site(shown.get(path, path), type(layer).__name__, stage, "", "", taken, given, axis))
        else:
            kept.append(Note(shown.get(path, path), type(layer).__name__, reason or f"kept: {stage}"))
    by_name = {shown.get(path, path): path for path in found}
    return LayerScan(tuple(sites), tuple(kept), macs, {site.name: by_name[site.name] for site in sites})


def _watched(
    module: nn.Module, inputs: Sequence[Tensor], layers: Iterable[nn.Module], note: Callable[..., None]
) -> int:
    """Runs the network with ``note`` called after each layer; its multiply-adds."""
    handles = [layer.register_forward_hook(note) for layer in {id(layer): layer for layer in layers}.values()]
    training = {m: m.training for m in module.modules()}
    counter = FlopCounterMode(display=False)
    try:
        module.eval()
        with torch.no_grad(), counter:
            module(*inputs)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise UnsupportedError(
            f"the network does not run on inputs of shape {shapes}: {type(error).__name__}: {first}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in training.items():
            m.training = mode
    return int(counter.get_total_flops()) // 2


def _is_layer(layer: nn.Module) -> bool:
    return isinstance(layer, (StageLayer, *_LAYERS))


def _reason(path: str, layer: nn.Module, paths: int) -> str | None:
    """Why a layer cannot be replaced, whoever calls it."""
    if not path:
        return "kept: the layer is the network itself"
    if paths > 1:
        return "kept: it is reached by several names"
    if is_parametrized(layer):
        return "kept: its weight is parametrized"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "kept: it carries hooks"
    if isinstance(layer, StageLayer):
        groups, transposed = layer.geometry.groups, layer.geometry.transposed
    else:
        if type(layer).forward not in {kind.forward for kind in _LAYERS}:
            return f"kept: {type(layer).__name__} has a forward of its own"
        groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    if transposed:
        return "kept: it is transposed"
    return "kept: it is grouped" if groups > 1 else None


def selected(layers: LayerScan, include: Sequence[str], exclude: Sequence[str]) -> tuple[tuple[Site, ...], list[Note]]:
    """The sites to factorize and why each other one is not: those whose names match, or with no ``include`` all but
    the first and the last, which carry the most for what they cost. UsageError for a pattern that nothing matches."""
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(site.name, pattern) for site in layers.sites):
            names = ", ".join(site.name for site in layers.sites[:6])
            raise UsageError(f"no layer that could be factorized matches {pattern!r}; there are {names}, ...")
    taken, notes = [], []
    ends = {layers.sites[0].name, layers.sites[-1].name} if layers.sites and not include else set()
    for site in layers.sites:
        if any(fnmatchcase(site.name, pattern) for pattern in exclude):
            notes.append(Note(site.name, site.op, "kept: excluded"))
        elif include and not any(fnmatchcase(site.name, pattern) for pattern in include):
            notes.append(Note(site.name, site.op, "kept: not included"))
        elif site.name in ends:
            notes.append(Note(site.name, site.op, "kept: first or last layer; --include takes it in"))
        else:
            taken.append(site)
    return tuple(taken), notes


def site_macs(site: Site) -> int:
    """Multiply-adds of the site's own layer on one sample."""
    return chain_macs(site, Chain((site.stage,)))


def chain_macs(site: Site, chain: Chain) -> int:
    """Multiply-adds of a chain in the place of the site, on one sample."""
    return sum(work.macs for work in chain_work(chain, site))


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts a module into a layer's place, on the device where the layer was."""
    old = next(module.get_submodule(path).parameters())
    module.set_submodule(path, layer.to(old.device), strict=True)


def ordinary(module: nn.Module) -> nn.Module:
    """A copy of the network in which every chain is a sequence of torch's own layers, and every stage one of them."""
    made = copy.deepcopy(module)
    for path, layer in list(made.named_modules()):
        if isinstance(layer, ChainLayer | StageLayer) and path:
            stages = layer.stages() if isinstance(layer, ChainLayer) else [layer]
            parts = [_torch_layer(part) for part in stages]
            parent = path.rpartition(".")[0]
            if not isinstance(made.get_submodule(parent), ChainLayer):
                plain = parts[0] if isinstance(layer, StageLayer) else nn.Sequential(*parts)
                made.set_submodule(path, plain.to(stages[0].weight.device), strict=True)
    return made


def _torch_layer(layer: StageLayer) -> nn.Module:
    """The same as a torch convolution or linear layer; itself where torch has none (uneven padding, other axes)."""
    g, (out, inner) = layer.geometry, layer.weight.shape[:2]
    made: Any
    if g.ndim == 0:
        if g.groups > 1 or layer.channel_axis != -1:
            return layer
        made = nn.Linear(inner, out, bias=layer.bias is not None)
    elif g.transposed or g.pads[: g.ndim] != g.pads[g.ndim :]:
        return layer
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[g.ndim - 1]
        made = kind(
            inner * g.groups,
            out,
            g.kernel,  # type: ignore[arg-type]
            g.strides,  # type: ignore[arg-type]
            g.pads[: g.ndim],  # type: ignore[arg-type]
            g.dilations,  # type: ignore[arg-type]
            g.groups,
            bias=layer.bias is not None,
        )
    with torch.no_grad():
        made.weight.copy_(layer.weight)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    made.train(layer.training)
    return made  # type: ignore[no-any-return]


def composed(site: Site, chain: Chain) -> Stage:
    """The one layer that equals a chain of ungrouped stages at the site."""
    weight = compose(chain.stages)[0].astype(chain.stages[-1].weight.dtype)
    assert weight.shape == site.stage.weight.shape
    return Stage(weight, chain.stages[-1].bias, site.stage.geometry)
