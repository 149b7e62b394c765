"""The values of one constant of an ONNX network, and the arithmetic that exporters put before a weight.

A :class:`Weight` holds plain arrays as read-only views, large ones as memory maps of the file they came from, so that
a network may be larger than the memory. Types that NumPy has no arithmetic for (bfloat16, 4-bit integers, strings)
and sparse tensors stay the protobuf message they were, and are written back unread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo
from onnx_graphsurgeon.ir.tensor import LazyValues

from passes.core.mapped import CHUNK_BYTES, release, spilled
from passes.core.site import Array

_PLAIN = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BOOL,
        TensorProto.INT8,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.UINT8,
        TensorProto.UINT16,
        TensorProto.UINT32,
        TensorProto.UINT64,
    }
)


class Weight(LazyValues):  # type: ignore[misc]
    """One constant. ``array`` is None where the values are opaque; then ``message`` is the whole tensor.

    ``header`` is the tensor's message without its values: name, dims, type, doc string, metadata.
    """

    def __init__(
        self, header: TensorProto, array: Array | None, message: TensorProto | SparseTensorProto | None
    ) -> None:
        self.header = header
        self.array = array
        self.message = message
        self.shape = list(header.dims)
        self.dtype = header.data_type if array is None else array.dtype
        self.nbytes = message.ByteSize() if message is not None else int(array.nbytes)  # type: ignore[union-attr]
        self._digest = ""
        self._wide: Array | None = None

    @classmethod
    def from_tensor(cls, tensor: TensorProto, folder: Path | None = None) -> Weight:
        """Reads a dense tensor; ``folder`` is where external data lies. Only opaque types keep the message."""
        header = _header(tensor)
        external = tensor.data_location == TensorProto.EXTERNAL
        if tensor.data_type not in _PLAIN or tensor.HasField("segment"):
            if external:
                tensor = internalised(tensor, folder)
            return cls(header, None, tensor)
        array = _mapped(tensor, folder) if external else np.asarray(numpy_helper.to_array(tensor))
        array.flags.writeable = False
        return cls(header, array, None)

    @classmethod
    def from_sparse(cls, tensor: SparseTensorProto) -> Weight:
        header = TensorProto(name=tensor.values.name, dims=tensor.dims, data_type=tensor.values.data_type)
        return cls(header, None, tensor)

    @classmethod
    def from_array(cls, name: str, array: Array) -> Weight:
        """A new constant. The array is taken as it is and must not be written to afterwards."""
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        header = TensorProto(name=name, dims=array.shape, data_type=dtype)
        view = array.view()
        view.flags.writeable = False
        return cls(header, view, None)

    @property
    def sparse(self) -> SparseTensorProto | None:
        return self.message if isinstance(self.message, SparseTensorProto) else None

    @property
    def params(self) -> int:
        """How many numbers it holds; stored ones for a sparse tensor."""
        return prod(self.header.dims if self.sparse is None else self.sparse.values.dims)

    @property
    def size_bytes(self) -> int:
        """What the values take in a file."""
        if self.array is not None:
            return int(self.array.nbytes)
        assert self.message is not None
        return int(self.message.ByteSize())

    @property
    def type_name(self) -> str:
        return str(TensorProto.DataType.Name(self.header.data_type)).lower()

    def load(self) -> Array:
        """The values, for graphsurgeon. Raises ValueError for opaque types."""
        if self.array is None:
            raise ValueError(f"values of type {self.type_name} cannot be read as an array")
        return self.array

    def floats(self) -> Array:
        """The values in a type that can be calculated with: half precision becomes single, exactly.

        What lies in a file stays out of memory: the wide copy lies in a temporary one.
        """
        assert self.array is not None
        if self.array.dtype != np.float16:
            return self.array
        if self._wide is None:
            mapped = isinstance(self.array, np.memmap)
            self._wide = spilled(self.array, np.float32) if mapped else self.array.astype(np.float32)
        return self._wide

    def chunks(self) -> Iterator[memoryview]:
        """The values as little-endian bytes, a few MiB at a time, so that a mapped file never has to be resident."""
        assert self.array is not None
        if self.array.nbytes == 0:
            return
        flat = np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, CHUNK_BYTES):
            yield memoryview(flat[start : start + CHUNK_BYTES])  # type: ignore[arg-type]
            release(self.array)

    def tensor(self) -> TensorProto:
        """A complete message. Not for sparse constants."""
        if self.array is None:
            assert isinstance(self.message, TensorProto)
            return self.message
        out = TensorProto()
        out.CopyFrom(self.header)
        out.raw_data = np.ascontiguousarray(self.array).tobytes()
        return out

    def digest(self) -> str:
        """sha256 of type, shape and values; computed once."""
        if not self._digest:
            sha = hashlib.sha256(f"{self.header.data_type}{list(self.header.dims)}".encode())
            if self.array is None:
                assert self.message is not None
                sha.update(self.message.SerializeToString(deterministic=True))
            else:
                for chunk in self.chunks():
                    sha.update(chunk)
            self._digest = sha.hexdigest()
        return self._digest


def _header(tensor: TensorProto) -> TensorProto:
    header = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    if tensor.HasField("doc_string"):
        header.doc_string = tensor.doc_string
    header.metadata_props.extend(tensor.metadata_props)
    return header


def _mapped(tensor: TensorProto, folder: Path | None) -> Array:
    info = ExternalDataInfo(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.memmap((folder or Path()) / info.location, dtype, "r", offset=info.offset or 0, shape=shape)


def internalised(tensor: TensorProto, folder: Path | None) -> TensorProto:
    """A copy with its external bytes inside."""
    info = ExternalDataInfo(tensor)
    out = TensorProto()
    out.CopyFrom(tensor)
    out.ClearField("external_data")
    out.ClearField("data_location")
    with ((folder or Path()) / info.location).open("rb") as file:
        file.seek(info.offset or 0)
        out.raw_data = file.read(info.length) if info.length else file.read()
    return out
