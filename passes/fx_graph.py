"""The :class:`passes.graph.Graph` contract for torch, on torch.fx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes import fx_affine, fx_cleanup, fx_pt2, fx_shapes, fx_sites, fx_text, fx_trace
from passes.core.cost import OpWork
from passes.core.site import Chain, Site, Stage
from passes.errors import InputError, UnsupportedError, UsageError, VerificationError, first_line
from passes.fx_emit import emit
from passes.fx_network import FORMS, Form, Network, Refusal, dtype_name, forms, label
from passes.fx_operators import raw_name
from passes.fx_sites import Spot
from passes.fx_trace import Examples
from passes.fx_workload import Workload
from passes.graph import Affine, Note, SiteScan, TensorSpec


class FxGraph:
    """A torch network under rewriting, in inference mode.

    ``notes`` holds what reading had to say, dimensions that were chosen. Sites are named by their module's path, calls
    of functions by the path of the module whose weight they read, or by their node; operators are named as in ONNX.
    """

    def __init__(
        self,
        network: Network,
        examples: tuple[torch.Tensor, ...],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        notes: tuple[Note, ...] = (),
    ) -> None:
        self._net = network
        self._examples = examples
        self._inputs, self._outputs = inputs, outputs
        self._dirty = True
        self.notes = notes

    @classmethod
    def trace(
        cls,
        module: nn.Module,
        example_inputs: Examples,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ) -> FxGraph:
        """The network that ``module`` computes in inference mode; the module itself stays as it is.

        ``example_inputs``: a tensor, tensors in the order of forward's parameters, or by their names; their shapes are
        what the network is priced at. A GraphModule is taken as it is. Raises UnsupportedError, naming module and line,
        where it cannot be traced, InputError where it cannot be run on the examples.
        """
        net, examples = fx_trace.trace(module, example_inputs)
        fx_shapes.record(net, examples)
        shapes = [tuple(t.shape) for t in examples]
        return cls._described(net, examples, shapes, input_names, output_names, ())

    @classmethod
    def read(
        cls,
        path: str | Path,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ) -> FxGraph:
        """The network in a ``.pt2`` file, as torch.export.save writes it. Nothing in the file is executed.

        ``shapes`` binds inputs with symbolic dimensions, for pricing alone. Raises InputError where the file cannot be
        used, UsageError where ``shapes`` does not fit it.
        """
        program = fx_pt2.load(Path(path), shapes or {})
        fx_shapes.record(program.network, program.examples)
        return cls._described(
            program.network, program.examples, program.inputs, input_names, output_names, program.notes, program.outputs
        )

    @classmethod
    def _described(
        cls,
        net: Network,
        examples: tuple[torch.Tensor, ...],
        shapes: Sequence[tuple[int | str | None, ...]],
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        notes: tuple[Note, ...],
        open_outputs: Sequence[tuple[int | str | None, ...]] | None = None,
    ) -> FxGraph:
        names = _names(input_names, [str(node.target) for node in net.placeholders], "input")
        inputs = tuple(
            TensorSpec(name, dtype_name(example.dtype), tuple(shape))
            for name, example, shape in zip(names, examples, shapes, strict=True)
        )
        results, wanted = _results(net)
        if output_names is None:  # a tensor of ONNX has one name: no output may be called like an input
            wanted = fx_trace.distinct([*names, *wanted])[len(names) :]
        elif both := set(names) & set(output_names):
            raise UsageError(f"an input and an output would both be called '{min(both)}'")
        names = _names(output_names, wanted, "output")
        outputs = tuple(
            TensorSpec(name, dtype_name(form.dtype), tuple(shape))
            for name, form, shape in zip(names, results, open_outputs or [f.shape for f in results], strict=True)
        )
        return cls(net, examples, inputs, outputs, notes)

    @property
    def module(self) -> fx.GraphModule:
        """The network as it is now. Its tensors are shared with clones: copy it before you change them."""
        if self._dirty:
            self._net.module.recompile()
            self._dirty = False
        return self._net.module

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The concrete shape of each input that the network is priced at."""
        return {spec.name: tuple(t.shape) for spec, t in zip(self._inputs, self._examples, strict=True)}

    def random_feeds(self, seed: int) -> dict[str, NDArray[Any]]:
        """Inputs of the priced shapes: standard normal floats, ones for integers, true for booleans."""
        rng = np.random.default_rng(seed)
        feeds = {}
        for spec, example in zip(self._inputs, self._examples, strict=True):
            shape = tuple(example.shape)
            floats = example.dtype.is_floating_point
            feeds[spec.name] = (rng.standard_normal(shape) if floats else np.ones(shape)).astype(_numpy(spec))
        return feeds

    def _scan(self) -> tuple[dict[fx.Node, Spot], list[Note]]:
        spots, kept = {}, []
        for node in self._net.nodes():
            if not fx_sites.is_kin(self._net, node) or self._net.is_stored(node):
                continue
            try:
                spots[node] = fx_sites.read(self._net, node)
            except Refusal as reason:
                kept.append(Note(label(node), raw_name(self._net, node), str(reason)))
        return spots, kept

    def _spot(self, site: Site) -> Spot:
        return fx_sites.read(self._net, self._net.find(site.name))

    def sites(self) -> SiteScan:
        """Sites in execution order, with concrete shapes, and what is kept with the reason."""
        spots, kept = self._scan()
        return SiteScan(tuple(spot.site for spot in spots.values()), tuple(kept))

    def replace(self, site: Site, chain: Chain) -> None:
        """Puts ``chain`` where ``site`` stood; new modules are ``<site>.<format>_<i>``. KeyError if it is gone."""
        emit(self._net, self._spot(site), chain)
        self._dirty = True

    def renew(self, site: Site, stage: Stage) -> None:
        """Puts a stage of other numbers, and of the site's structure, into its place under the site's name."""
        emit(self._net, self._spot(site), Chain((stage,)), [site.name])
        self._dirty = True

    def affines(self) -> tuple[Affine, ...]:
        """Affine nodes that could be folded into the site before them."""
        found = (fx_affine.affine_after(self._net, spot) for spot in self._scan()[0].values())
        return tuple(following.affine for following in found if following is not None)

    def fold(self, affine: Affine, stage: Stage) -> None:
        """Replaces the affine's site by ``stage``, which keeps the site's name, and removes the affine node."""
        spot = self._spot(affine.site)
        following = fx_affine.affine_after(self._net, spot)
        if following is None or following.affine.node != affine.node:
            raise KeyError(f"'{affine.node}' does not follow '{affine.site.name}' any more")
        emit(self._net, replace(spot, nodes=(*spot.nodes, *following.nodes)), Chain((stage,)), [affine.site.name])
        self._dirty = True

    def constants_of(self, name: str) -> set[str]:
        """Paths of the parameters and buffers that the node of that name reads, or its module holds."""
        node = self._net.find(name)
        paths = {str(read.target) for read in node.all_input_nodes if read.op == "get_attr"}
        if node.op == "call_module":
            module = self._net.called(node)
            held = (*module.named_parameters(), *module.named_buffers())
            paths |= {f"{node.target}.{path}" for path, _ in held}
        return paths

    def adjacent(self) -> tuple[tuple[Site, Site], ...]:
        """Pairs of sites where the second is the only reader of the first's output and nothing lies between."""
        spots = self._scan()[0]
        pairs = []
        for first in spots.values():
            reader = self._net.only_reader(first.target)
            second = spots.get(reader) if reader is not None else None
            if second is not None and second.source is first.target and _match(first, second):
                pairs.append((first.site, second.site))
        return tuple(pairs)

    def merge(self, first: Site, second: Site, stage: Stage) -> None:
        """Puts one ``stage``, named ``<first>+<second>``, in place of two adjacent sites."""
        one, two = self._spot(first), self._spot(second)
        if self._net.only_reader(one.target) is not two.nodes[0] or not _match(one, two):
            raise KeyError(f"'{second.name}' does not follow '{first.name}' any more")
        emit(self._net, replace(one, nodes=(*one.nodes, *two.nodes)), Chain((stage,)), [f"{first.name}+{second.name}"])
        self._dirty = True

    def drop_identities(self) -> tuple[Note, ...]:
        """Removes nodes that pass their input on unchanged (Identity, Dropout in inference, ...); names them."""
        self._dirty = True
        return fx_cleanup.drop_identities(self._net)

    def drop_dead_code(self) -> tuple[Note, ...]:
        """Removes nodes and constants that no output depends on; names them. What may have other effects stays."""
        self._dirty = True
        return fx_cleanup.drop_dead_code(self._net)

    def workload(self) -> tuple[OpWork, ...]:
        """Every node that computes tensors, with concrete shapes."""
        return Workload(self._net, self._scan()[0]).ops()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs in the order of ``outputs``, by torch on the CPU. Raises InputError where ``feeds`` do not fit."""
        wanted = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in self._inputs)
        if set(feeds) != {spec.name for spec in self._inputs}:
            raise InputError(f"inputs are given for {', '.join(feeds) or 'nothing'}; expected {wanted}")
        tensors = [torch.from_numpy(np.array(feeds[s.name], dtype=_numpy(s))) for s in self._inputs]
        tensors = [t.to(example.dtype) for t, example in zip(tensors, self._examples, strict=True)]
        try:
            with torch.no_grad():
                result = self.module(*tensors)
        except Exception as error:
            reason = first_line(error)
            raise InputError(f"the network cannot be run on these inputs (expected {wanted}): {reason}") from error
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return [(t.float() if t.dtype is torch.bfloat16 else t).detach().cpu().numpy().copy() for t in leaves]

    def check(self) -> None:
        """Raises VerificationError when torch.fx's checker finds fault, or a tensor is not what it is known as."""
        try:
            self._net.graph.lint()
            known = fx_shapes.observe(self._net, self._examples)
        except InputError as error:
            raise VerificationError(f"the rewritten network does not run: {error}") from error
        except RuntimeError as error:
            raise VerificationError(f"the rewritten network is no valid torch.fx graph: {error}") from error
        for node, (found, _) in known.items():
            if found != node.meta.get(FORMS, ()):
                was, now = (", ".join(map(str, some)) or "nothing" for some in (forms(node), found))
                raise VerificationError(f"'{label(node)}' gave {was} and now gives {now}")

    def to_text(self) -> str:
        """A stable listing with weights by digest: equal texts mean equal networks."""
        return fx_text.listing(self._net, self._inputs, self._outputs)

    def clone(self) -> FxGraph:
        """An independent copy; tensors are shared."""
        return FxGraph(self._net.clone(), self._examples, self._inputs, self._outputs, self.notes)


def _match(first: Spot, second: Spot) -> bool:
    """True if one layer can do both: same type, and the second reads the axis that the first writes."""
    one, two = first.site, second.site
    same = one.stage.geometry.ndim == two.stage.geometry.ndim and one.channel_axis == two.channel_axis
    return same and first.dtype == second.dtype


def _names(given: Sequence[str] | None, found: Sequence[str], what: str) -> list[str]:
    if given is None:
        return list(found)
    if len(given) != len(found) or len(set(given)) != len(given):
        raise UsageError(f"{len(found)} different {what} names are wanted, given are {', '.join(given)}")
    return list(given)


def _results(net: Network) -> tuple[list[Form], list[str]]:
    """The network's outputs and names for them: keys where they come in a dict. UnsupportedError if there are none."""
    result = net.output.args[0]
    leaves = pytree.tree_leaves(result, is_leaf=lambda value: isinstance(value, fx.Node))
    found: list[Form] = []
    for leaf in leaves:
        if isinstance(leaf, fx.Node):
            found.extend(forms(leaf))
    if not found:
        raise UnsupportedError("the network has no tensor among its outputs")
    if isinstance(result, dict) and len(result) == len(found):
        return found, [str(key) for key in result]
    return found, ["output"] if len(found) == 1 else [f"output_{i}" for i in range(len(found))]


def _numpy(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
