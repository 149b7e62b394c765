"""The :class:`passes.graph.Graph` contract for ONNX, on onnx-graphsurgeon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from passes import onnx_affine, onnx_runtime, onnx_shapes, onnx_write
from passes.core.cost import OpWork
from passes.core.site import Chain, Site, Stage
from passes.errors import InputError, UnsupportedError, VerificationError
from passes.graph import Affine, Note, SiteScan, TensorSpec
from passes.onnx_constants import Refusal
from passes.onnx_emit import emit
from passes.onnx_sites import KIN, Reading, StaticDims, read
from passes.onnx_surgery import Surgery
from passes.onnx_weights import Weight
from passes.onnx_workload import Workload


class OnnxGraph:
    """An ONNX network under rewriting.

    ``notes`` holds what reading had to say: dimensions that were chosen, shapes that stay unknown.
    """

    def __init__(
        self, surgery: Surgery, input_shapes: Mapping[str, tuple[int, ...]], static: StaticDims, notes: tuple[Note, ...]
    ) -> None:
        self._surgery = surgery
        self._input_shapes = dict(input_shapes)
        self._static = static
        self.notes = notes
        self._session: onnxruntime.InferenceSession | None = None

    @classmethod
    def from_model(
        cls, model: ModelProto, shapes: Mapping[str, tuple[int, ...]] | None = None, folder: Path | None = None
    ) -> OnnxGraph:
        """A graph on a model in memory, which is not written to. ``shapes`` binds inputs with symbolic dimensions."""
        surgery = Surgery.from_model(model, folder)
        real = {t.name for t in surgery.main.graph.inputs}
        inputs = {info.name: info for info in surgery.main.frame.input if info.name in real}
        binding = onnx_shapes.bind(inputs, shapes or {})
        onnx_shapes.infer(surgery, binding.shapes)
        static = onnx_shapes.static_dims(surgery)
        notes = onnx_runtime.observe(surgery, onnx_runtime.random_feeds(surgery, binding.shapes))
        return cls(surgery, binding.shapes, static, (*binding.notes, *notes))

    @classmethod
    def read(cls, path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> OnnxGraph:
        path = Path(path)
        return cls.from_model(onnx.load(path), shapes, path.parent)

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

    def _scan(self) -> tuple[dict[str, Reading], list[Note]]:
        readings, kept = {}, []
        for scope, node in self._surgery.nodes():
            if node.op not in KIN:
                continue
            try:
                readings[node.name] = read(self._surgery, scope, node, self._static)
            except Refusal as reason:
                kept.append(Note(node.name, node.op, str(reason)))
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
        self._session = None

    def affines(self) -> tuple[Affine, ...]:
        """Affine nodes that could be folded into the site before them."""
        found = (onnx_affine.affine_after(self._surgery, spot) for spot in self._scan()[0].values())
        return tuple(affine for affine in found if affine is not None)

    def workload(self) -> tuple[OpWork, ...]:
        """Every node of the network and of its bodies with concrete shapes; () for a shape that is unknown."""
        return Workload(self._surgery, self._scan()[0]).ops()

    def model(self) -> ModelProto:
        """The network as a message, weights inside. Raises ValueError above 2 GiB, as protobuf does."""
        return self._surgery.export(Weight.tensor)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs in the order of ``outputs``, by onnxruntime on the CPU."""
        if self._session is None:
            self._session = onnx_runtime.session(self._surgery, self._surgery.export)
        return list(self._session.run(None, dict(feeds)))

    def save(self, path: str | Path, single_file_bytes: int = onnx_write.SINGLE_FILE_BYTES) -> tuple[Path, ...]:
        """Writes a self-contained model; from ``single_file_bytes`` on with one data file beside it. Returns the files."""
        return onnx_write.write(self._surgery, Path(path), single_file_bytes)

    def clone(self) -> OnnxGraph:
        """An independent copy; constants are shared."""
        return OnnxGraph(self._surgery.clone(), self._input_shapes, self._static, self.notes)


def _spec(info: ValueInfoProto) -> TensorSpec:
    tensor = info.type.tensor_type
    dims = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim
    )
    dtype = "" if not tensor.elem_type else np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return TensorSpec(info.name, dtype, dims)
