"""The :class:`passes.graph.Graph` contract for ONNX, on onnx-graphsurgeon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from passes import (
    onnx_affine,
    onnx_check,
    onnx_cleanup,
    onnx_reader,
    onnx_renew,
    onnx_runtime,
    onnx_shapes,
    onnx_text,
    onnx_write,
)
from passes.core.cost import OpWork
from passes.core.mapped import release
from passes.core.site import Chain, Site, Stage
from passes.errors import InputError, UnsupportedError
from passes.graph import Affine, Note, SiteScan, TensorSpec
from passes.onnx_constants import Refusal
from passes.onnx_emit import emit
from passes.onnx_sites import KIN, Reading, StaticDims, read
from passes.onnx_surgery import LARGE_BYTES, Surgery
from passes.onnx_weights import Weight
from passes.onnx_workload import Workload


class OnnxGraph:
    """An ONNX network under rewriting.

    ``notes`` holds what reading had to say: dimensions that were chosen, shapes that stay unknown. ``data_files`` are
    the files of external data that it was read from.
    """

    def __init__(
        self,
        surgery: Surgery,
        input_shapes: Mapping[str, tuple[int, ...]],
        static: StaticDims,
        strict: bool,
        notes: tuple[Note, ...],
    ) -> None:
        self._surgery = surgery
        self._input_shapes = dict(input_shapes)
        self._static = static
        self._strict = strict
        self.notes = notes
        self.data_files: tuple[Path, ...] = ()
        self._session: onnxruntime.InferenceSession | None = None

    @classmethod
    def read(
        cls,
        path: str | Path,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        large_bytes: int = LARGE_BYTES,
    ) -> OnnxGraph:
        """The network in an ``.onnx`` file, with external data if it has any.

        ``shapes`` binds inputs with symbolic dimensions, for pricing alone: the written file keeps them symbolic.
        From ``large_bytes`` of external data on, weights and what replaces them stay in files, mapped. Raises
        InputError where the file cannot be used, UsageError where ``shapes`` does not fit it.
        """
        path = Path(path)
        model, files = onnx_reader.load(path)
        with onnx_reader.refusing(path):
            graph = cls._build(model, shapes or {}, path.parent, str(path), large_bytes)
        graph.data_files = files
        return graph

    @classmethod
    def from_model(cls, model: ModelProto, shapes: Mapping[str, tuple[int, ...]] | None = None) -> OnnxGraph:
        """The network in a message, which is not written to. Raises InputError where it is not valid."""
        with onnx_reader.refusing("the model"):
            onnx.checker.check_model(model)
            return cls._build(model, shapes or {}, None, "the model", LARGE_BYTES)

    @classmethod
    def _build(
        cls,
        model: ModelProto,
        shapes: Mapping[str, tuple[int, ...]],
        folder: Path | None,
        where: str,
        large_bytes: int,
    ) -> OnnxGraph:
        surgery = Surgery.from_model(model, folder, large_bytes)
        onnx_reader.check_numbers(where, surgery)
        bound, notes = onnx_runtime.settle(surgery, shapes)
        return cls(surgery, bound, onnx_shapes.static_dims(surgery), onnx_check.is_strict(surgery), notes)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        real = {t.name for t in self._surgery.main.graph.inputs}
        return tuple(_spec(info) for info in self._surgery.main.frame.input if info.name in real)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_spec(info) for info in self._surgery.main.frame.output)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The concrete shape of each input that the network is priced at."""
        return dict(self._input_shapes)

    def random_feeds(self, seed: int) -> dict[str, NDArray[Any]]:
        """Inputs of the priced shapes: standard normal floats, ones for integers, true for booleans."""
        return onnx_runtime.random_feeds(self._surgery, self._input_shapes, seed)

    def _scan(self) -> tuple[dict[str, Reading], list[Note]]:
        readings, kept = {}, []
        for scope, node in self._surgery.nodes():
            if node.op not in KIN:
                continue
            try:
                readings[node.name] = read(self._surgery, scope, node, self._static)
            except Refusal as reason:
                kept.append(Note(node.name, node.op, str(reason)))
        for function in self._surgery.head.functions:
            for index, inner in enumerate(function.node):
                if inner.op_type in KIN:
                    name = f"{function.domain}::{function.name}/{inner.name or index}"
                    kept.append(Note(name, inner.op_type, "it stands in a function"))
        return readings, kept

    def _reading(self, site: Site) -> Reading:
        path = self._surgery.homes.get(site.name)
        if path is None:
            raise KeyError(f"no node '{site.name}' in the network: was it replaced before?")
        scope = self._surgery.scopes[path]
        node = next(n for n in scope.graph.nodes if n.name == site.name)
        return read(self._surgery, scope, node, self._static)

    def sites(self) -> SiteScan:
        """Sites in execution order, with concrete shapes, and what is kept with the reason."""
        readings, kept = self._scan()
        return SiteScan(tuple(r.site for r in readings.values()), tuple(kept))

    def replace(self, site: Site, chain: Chain) -> None:
        """Puts ``chain`` where ``site`` stood; new nodes are named ``<site>/<format>_<i>``. KeyError if it is gone."""
        emit(self._surgery, self._reading(site), chain)
        release(site.stage.weight)
        self._session = None

    def renew(
        self,
        stages: Mapping[str, Stage],
        constants: Mapping[str, NDArray[Any]],
        norms: Mapping[str, Sequence[NDArray[Any]]],
    ) -> None:
        """Puts other numbers into the network, in the types that it stores them in; its structure stays.

        ``stages`` by site, of the geometry that the site has; ``constants`` by name of an initializer or of the output
        of a Constant; ``norms``: scale, shift, mean and variance by the name of what a BatchNormalization writes.
        """
        for name, value in constants.items():
            onnx_renew.renew_constant(self._surgery, name, value)
        for name, values in norms.items():
            onnx_renew.renew_norm(self._surgery, name, values)
        readings = self._scan()[0]
        layers = [(readings[name], stage) for name, stage in stages.items()]
        onnx_renew.renew_sites(self._surgery, layers, self._static)
        self._session = None

    def affines(self) -> tuple[Affine, ...]:
        """Affine nodes that could be folded into the site before them."""
        found = (onnx_affine.affine_after(self._surgery, spot) for spot in self._scan()[0].values())
        return tuple(affine for affine in found if affine is not None)

    def fold(self, affine: Affine, stage: Stage) -> None:
        """Replaces the affine's site by ``stage``, which keeps the site's name, and removes the affine node."""
        spot = self._reading(affine.site)
        node = self._surgery.only_reader(spot.scope, spot.target)
        if node is None or node.name != affine.node:
            raise KeyError(f"'{affine.node}' does not follow '{affine.site.name}' any more")
        wider = replace(spot, nodes=(*spot.nodes, node), target=node.outputs[0])
        emit(self._surgery, wider, Chain((stage,)), [affine.site.name])
        self._session = None

    def adjacent(self) -> tuple[tuple[Site, Site], ...]:
        """Pairs of sites where the second is the only reader of the first's output and nothing lies between."""
        readings = self._scan()[0]
        pairs = []
        for first in readings.values():
            node = self._surgery.only_reader(first.scope, first.target)
            second = readings.get(node.name) if node is not None else None
            if second is not None and second.source is first.target and _match(first, second):
                pairs.append((first.site, second.site))
        return tuple(pairs)

    def merge(self, first: Site, second: Site, stage: Stage) -> None:
        """Puts one ``stage``, named ``<first>+<second>``, in place of two adjacent sites."""
        one, two = self._reading(first), self._reading(second)
        if self._surgery.only_reader(one.scope, one.target) is not two.nodes[0] or not _match(one, two):
            raise KeyError(f"'{second.name}' does not follow '{first.name}' any more")
        both = replace(one, nodes=(*one.nodes, *two.nodes), target=two.target)
        emit(self._surgery, both, Chain((stage,)), [f"{first.name}+{second.name}"])
        self._session = None

    def drop_identities(self) -> tuple[Note, ...]:
        """Removes nodes that pass their input on unchanged; names them. Outputs of the graph keep their names."""
        self._session = None
        return onnx_cleanup.drop_identities(self._surgery)

    def drop_dead_code(self) -> tuple[Note, ...]:
        """Removes nodes and constants that no output depends on; names them."""
        self._session = None
        return onnx_cleanup.drop_dead_code(self._surgery)

    def workload(self) -> tuple[OpWork, ...]:
        """Every node of the network and of its bodies with concrete shapes; () for a shape that is unknown."""
        return Workload(self._surgery, self._scan()[0]).ops()

    def model(self) -> ModelProto:
        """The network as a message, weights inside. Raises ValueError above 2 GiB, as protobuf does."""
        return self._surgery.export(Weight.tensor)

    def skeleton(self) -> tuple[ModelProto, dict[str, NDArray[Any]]]:
        """The network as a message without the values of its larger constants, and those by name; of any size."""
        return onnx_shapes.skeleton(self._surgery)

    @property
    def is_large(self) -> bool:
        """True for a network that lies in files, because it is too large to be brought into memory."""
        return self._surgery.spills

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs in the order of ``outputs``, by onnxruntime on the CPU.

        Raises UnsupportedError where onnxruntime has no kernel for an operator, InputError where ``feeds`` do not fit.
        """
        if self._session is None:
            try:
                self._session = onnx_runtime.session(self._surgery, self._surgery.export)
            except Exception as error:
                reason = onnx_reader.one_line(error)
                raise UnsupportedError(f"onnxruntime cannot load the network: {reason}") from error
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as error:
            wanted = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in self.inputs)
            reason = onnx_reader.one_line(error)
            raise InputError(f"the network cannot be run on these inputs (expected {wanted}): {reason}") from error

    def save(self, path: str | Path, single_file_bytes: int = onnx_write.SINGLE_FILE_BYTES) -> tuple[Path, ...]:
        """Writes a self-contained model, from ``single_file_bytes`` on with one data file beside it.

        Returns the files written. Raises InputError where the place cannot be written to.
        """
        return onnx_write.write(self._surgery, Path(path), single_file_bytes)

    def check(self) -> None:
        """Raises VerificationError when ONNX's checker, or its strict shape inference, finds fault.

        Strict inference is asked for only where the network passed it when it was read.
        """
        onnx_check.check(self._surgery, self._strict)

    def to_text(self) -> str:
        """A stable listing with constants by digest: equal texts mean equal networks."""
        return onnx_text.listing(self._surgery)

    def clone(self) -> OnnxGraph:
        """An independent copy; constants are shared."""
        return OnnxGraph(self._surgery.clone(), self._input_shapes, self._static, self._strict, self.notes)


def _match(first: Reading, second: Reading) -> bool:
    """True if one layer can do both: same type, and the second reads the axis that the first writes."""
    if first.dtype != second.dtype or second.turned or first.left != second.left:
        return False
    one, two = first.site.stage.geometry, second.site.stage.geometry
    return one.ndim == two.ndim and (one.ndim > 0 or first.out_axis == second.site.channel_axis)


def _spec(info: ValueInfoProto) -> TensorSpec:
    tensor = info.type.tensor_type
    dims = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim
    )
    dtype = "" if not tensor.elem_type else np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return TensorSpec(info.name, dtype, dims)
