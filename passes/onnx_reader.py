"""Opens an ONNX file, or says in one line why it cannot be used.

Checked before anything is believed: that the file is a whole ONNX model of a version that is supported, that its
external data is there, complete and inside the model's own folder, and that its weights are numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo

from passes.core.mapped import CHUNK_BYTES, release
from passes.core.site import Array
from passes.errors import InputError, RankcError, UnsupportedError
from passes.onnx_constants import Refusal, constant
from passes.onnx_sites import KIN
from passes.onnx_surgery import Surgery
from passes.onnx_weights import Weight, internalised

OPSETS = (7, min(26, onnx.defs.onnx_opset_version()))
"""First and last version of the default operator set that is read: below 7, broadcasting and BatchNormalization mean
something else; above 26, onnxruntime has no kernels."""
IR_VERSIONS = (3, 13)


def load(path: Path) -> tuple[ModelProto, tuple[Path, ...]]:
    """The model at ``path``, checked, its external data still outside, and the files which hold that.

    Raises InputError with one line.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the .onnx file in it")
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path} is empty; expected an ONNX model: copy or export it again")
        if size >= 1 << 31:
            raise InputError(f"{path} is larger than 2 GiB, which protobuf cannot read; export it with external data")
        model: ModelProto = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give the path of an .onnx file") from error
    except RankcError:
        raise
    except Exception as error:  # protobuf has several; all mean the same
        if path.suffix.lower() != ".onnx":
            raise InputError(f"{path} is no ONNX model; give an .onnx file, as torch.onnx.export writes it") from error
        raise InputError(f"{path} is truncated, damaged or no ONNX model; export it again") from error
    with refusing(path):
        _check_versions(path, model)
        files = _check_external(path, model)
        onnx.checker.check_model(path)
        for tensor in attribute_tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(internalised(tensor, path.parent))
    return model, files


class refusing:
    """Turns whatever a library raises on a damaged model into one line; errors of this package pass."""

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, RankcError) or not isinstance(error, Exception):
            return
        raise InputError(f"{self.path} is not a valid ONNX model: {one_line(error)}; export it again") from error


def one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit].rstrip()} ..."


def _check_versions(path: Path, model: ModelProto) -> None:
    if not model.HasField("graph") or not model.ir_version or not model.graph.output:
        raise InputError(f"{path} holds no ONNX network; expected a model with a graph and outputs: export it again")
    low, high = IR_VERSIONS
    if not low <= model.ir_version <= high:
        raise UnsupportedError(f"{path} has IR version {model.ir_version}; supported are {low} to {high}: convert it")
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    low, high = OPSETS
    if not versions:
        raise UnsupportedError(f"{path} names no opset; supported are {low} to {high}: export it again")
    if not low <= versions[0] <= high:
        hint = "convert it with onnx.version_converter or export it again"
        raise UnsupportedError(f"{path} uses opset {versions[0]}; supported are {low} to {high}: {hint}")


def _check_external(path: Path, model: ModelProto) -> tuple[Path, ...]:
    """The data files. They must lie in the model's folder, whatever links say, and hold what the tensors need."""
    files: dict[str, Path] = {}
    folder = path.parent.resolve()
    for tensor in [*initializers(model.graph), *attribute_tensors(model)]:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = f"{path}: tensor '{tensor.name}'"
        info = ExternalDataInfo(tensor)
        location = Path(info.location)
        inside = info.location and not location.is_absolute() and ".." not in location.parts
        target = (folder / location).resolve() if inside else folder
        if not inside or folder not in target.parents:
            raise InputError(
                f"{where} keeps its data in '{info.location}', outside the model's folder; put it beside the model"
            )
        if not target.is_file():
            raise InputError(f"{where} keeps its data in '{info.location}', which is missing; copy it beside the model")
        files[info.location] = path.parent / location
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        needed = info.length if info.length is not None else prod(tensor.dims) * width
        has, end = target.stat().st_size, (info.offset or 0) + needed
        if end > has:
            raise InputError(f"{where} needs {end} bytes of '{info.location}', which has {has}; copy the file again")
        if info.length is not None and tensor.data_type in _WHOLE_BYTES and info.length != prod(tensor.dims) * width:
            raise InputError(
                f"{where} has shape {list(tensor.dims)} and {info.length} bytes of data,"
                f" expected {prod(tensor.dims) * width}; export the model again"
            )
    return tuple(files.values())


_WHOLE_BYTES = frozenset(
    {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64}
)


def initializers(graph: GraphProto) -> Iterator[TensorProto]:
    """Dense initializers of a graph and of all bodies in it."""
    yield from graph.initializer
    for node in graph.node:
        for body in _bodies(node):
            yield from initializers(body)


def attribute_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Tensors that nodes hold as attributes, in bodies and functions too; parts of sparse tensors as well."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            continue
        node = nodes.pop()
        graphs.extend(_bodies(node))
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def check_numbers(path: Path | str, surgery: Surgery) -> None:
    """Raises InputError where an initializer holds NaN, or a weight of a conv, linear or normalisation layer infinity.

    Infinity elsewhere is legitimate: attention masks and clip bounds are made of it.
    """
    for scope in surgery.scopes.values():
        for name, stored in scope.weights.items():
            weight = surgery.weight_of(stored)
            if weight.array is not None and any(np.isnan(part).any() for part in _float_parts(weight)):
                raise InputError(f"{path}: initializer '{name}' holds NaN; train or export the model again")
    finite: dict[int, bool] = {}
    for _, node in surgery.nodes():
        if node.op in KIN or node.op.endswith("Normalization"):
            for tensor in node.inputs:
                value = _value(surgery, tensor)
                if value is not None and not finite.setdefault(id(tensor), bool(np.isfinite(value).all())):
                    what = f"'{tensor.name}' of node '{node.name}'"
                    raise InputError(f"{path}: weight {what} holds NaN or infinity; train or export the model again")
                if value is not None:
                    release(value)


def _value(surgery: Surgery, tensor: gs.Tensor) -> Array | None:
    if tensor.is_empty():
        return None
    try:
        value = constant(surgery, tensor).value
    except Refusal:
        return None  # computed, or of a type that cannot hold infinity
    return value if value.dtype.kind == "f" else None


def _float_parts(weight: Weight) -> Iterator[Array]:
    array = weight.array
    if array is not None and array.dtype.kind == "f" and array.size:
        flat = array.reshape(-1)
        step = CHUNK_BYTES // array.itemsize
        for start in range(0, flat.size, step):
            yield flat[start : start + step]
            release(array)
