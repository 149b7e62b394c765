"""Writes an ONNX network without ever holding a second copy of its weights.

Below 2 GiB the result is one file, streamed in protobuf's wire format; above, one file of external data lies beside it.
Either way it is complete in itself, whatever files the network was read from, and it appears under its name at once
or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from onnx import TensorProto

from passes.errors import InputError
from passes.files import appearing
from passes.onnx_surgery import Surgery
from passes.onnx_weights import Weight

SINGLE_FILE_BYTES = (1 << 31) - (1 << 20)
"""Protobuf reads messages below 2 GiB; a little is left for readers that copy."""
_ALIGNMENT_BYTES = 4096
"""Offsets in a data file: page-aligned, so that runtimes can map it."""
_INLINE_BYTES = 1024
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data in onnx.proto."""


class DataFile:
    """A file of external data under construction; ``location`` is the name under which the model will find it."""

    def __init__(self, file: IO[bytes], location: str) -> None:
        self.file, self.location = file, location

    def tensor(self, weight: Weight) -> TensorProto:
        """Appends the values and returns the message that points to them; small or opaque ones stay inside."""
        if weight.array is None or weight.size_bytes < _INLINE_BYTES:
            return weight.tensor()
        offset = -(-self.file.tell() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.file.write(b"\0" * (offset - self.file.tell()))
        for chunk in weight.chunks():
            self.file.write(chunk)
        out = TensorProto()
        out.CopyFrom(weight.header)
        out.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", offset), ("length", weight.size_bytes)):
            out.external_data.add(key=key, value=str(value))
        return out


def stored_bytes(surgery: Surgery) -> int:
    """Bytes of all initializers."""
    weights = (surgery.weight_of(c) for scope in surgery.scopes.values() for c in scope.weights.values())
    return sum(weight.size_bytes for weight in weights)


def write(surgery: Surgery, path: Path, single_file_bytes: int = SINGLE_FILE_BYTES) -> tuple[Path, ...]:
    """Writes the network to ``path`` and returns the files written: the model, then its data if it needs a file.

    Raises InputError where the folder cannot be written to.
    """
    data_path = path.with_name(f"{path.name}.data")
    try:
        if stored_bytes(surgery) + _frame_bytes(surgery) < single_file_bytes:
            with appearing(path) as file:
                stream(surgery, file)
            return (path,)
        with appearing(data_path) as data, appearing(path) as file:
            model = surgery.export(DataFile(data, data_path.name).tensor)
            file.write(model.SerializeToString())
            file.flush()
            # No moment may show an old model beside new data: the old model goes before the data comes.
            path.unlink(missing_ok=True)
        return path, data_path
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {path}: {reason}; choose a folder that can be written") from error


def _frame_bytes(surgery: Surgery) -> int:
    """An upper bound for what a model takes beside its initializers' values."""
    messages = sum(message.ByteSize() + 64 for message in surgery.messages.values())
    frames = sum(scope.frame.ByteSize() + 256 * len(scope.weights) for scope in surgery.scopes.values())
    return int(messages + frames + surgery.head.ByteSize())


def stream(surgery: Surgery, file: IO[bytes]) -> None:
    """The whole model as one message, the main graph's initializers behind its other fields, one at a time."""
    model = surgery.export(Weight.tensor, main_weights=False)
    frame = model.graph.SerializeToString()
    model.ClearField("graph")
    weights = [surgery.weight_of(c) for c in surgery.main.weights.values()]
    dense = [weight for weight in weights if weight.sparse is None]
    heads = [_tensor_head(weight) for weight in dense]
    values = [weight.size_bytes if weight.array is not None else 0 for weight in dense]
    sizes = [len(head) + value for head, value in zip(heads, values, strict=True)]
    openings = [_tag(_INITIALIZER, size) for size in sizes]
    file.write(model.SerializeToString())
    file.write(_tag(_GRAPH, len(frame) + sum(map(len, openings)) + sum(sizes)))
    file.write(frame)
    for weight, head, opening in zip(dense, heads, openings, strict=True):
        file.write(opening + head)
        if weight.array is not None:
            for chunk in weight.chunks():
                file.write(chunk)


def _tensor_head(weight: Weight) -> bytes:
    """The tensor's message up to its values; the whole message where those are opaque."""
    if weight.array is None:
        return bytes(weight.tensor().SerializeToString())
    return bytes(weight.header.SerializeToString()) + _tag(_RAW_DATA, weight.size_bytes)


def _tag(field: int, size: int) -> bytes:
    """Opening of a length-delimited field: key and length as base-128 varints."""
    out = bytearray()
    for number in (field << 3 | 2, size):
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)
