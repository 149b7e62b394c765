"""Where the tensors of a network lie in DRAM, and which of them are copied into another order of bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from accel_sim.engine.layout import byte_offsets, pack_map
from accel_sim.program.isa import Tensor
from codegen.asic_compile.builder import Builder
from codegen.asic_compile.places import Place, rows_shape, whole_map
from codegen.asic_compile.transfers import WholeMap
from codegen.quantized.graph import QConv, QReshape, QuantizedGraph


class TensorPlaces(dict[str, Place]):
    """A place per tensor that lies in DRAM, by name.

    A tensor is stored as the map of its shape; a matrix that a linear layer reads or writes as rows x features, its
    leading axes being rows. A reshaped tensor is the bytes of the one that it is made from.
    """

    def __init__(self, graph: QuantizedGraph, builder: Builder) -> None:
        super().__init__()
        self.graph = graph
        self.builder = builder
        self.copies: dict[str, Place] = {}
        self._named: set[str] = set()
        linear = [op for op in graph.operations if isinstance(op, QConv) and op.geometry.ndim == 0]
        self._rows = {name for op in linear for name in (op.input, op.output)}

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape whose map a tensor is stored as."""
        shape = self.graph.tensors[name].shape
        return rows_shape(shape) if name in self._rows and len(shape) != 2 else shape

    def place_all(self, made: Sequence[str], absent: Collection[str], as_maps: Callable[[], Iterable[str]]) -> None:
        """Gives all tensors their places: inputs, ``made`` but for the ``absent``, and constants.

        ``as_maps`` names, once there are places, what is read in the layout of maps and no other: where it lies
        otherwise, it gets a copy.
        """
        views = {op.output: op.input for op in self.graph.operations if isinstance(op, QReshape)}
        for name in (*self.graph.inputs, *made):
            if name not in absent and name not in views and name not in self:
                self[name] = self._new_map(name)
        for name, source in views.items():  # in an order in which they can be made
            if source in self:
                self[name] = self[source].reshaped(self.graph.tensors[name].shape)
        columns = self.builder.columns
        for name in as_maps():
            if name not in self.copies and name in self and not self[name].is_map(self.stored_shape(name), columns):
                self.copies[name] = self._new_map(name)
        for name, values in self.graph.constants.items():
            if name in self.graph.tensors:
                shape = self.stored_shape(name)
                self.builder.separate_constants()
                data = pack_map(np.asarray(values).reshape(1, *shape), shape, columns).tobytes()
                self[name] = Place(self.builder.constant(data), self._offsets(name))
        for name, source in views.items():
            if name not in self:
                self[name] = self[source].reshaped(self.graph.tensors[name].shape)

    def as_map(self, name: str) -> WholeMap:
        """A tensor, or its copy, in the layout of maps."""
        place = self.copies.get(name, self[name])
        return whole_map(place.address, self.stored_shape(name))

    def announce(self, name: str, role: str) -> None:
        """Adds a tensor to the program's list, once."""
        if name in self._named:
            return
        self._named.add(name)
        tensor = self.graph.tensors[name]
        self.builder.tensors.append(
            Tensor(
                name=name,
                shape=self.stored_shape(name),
                address=self.copies.get(name, self[name]).address,
                scale=float(np.float32(tensor.scale)),
                zero_point=tensor.zero_point,
                signed=tensor.signed,
                role=role,
            )
        )

    def _new_map(self, name: str) -> Place:
        room = whole_map(0, self.stored_shape(name))
        return Place(self.builder.place(room.images, room.channels, room.size).address, self._offsets(name))

    def _offsets(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        stored = byte_offsets(self.stored_shape(name), self.builder.columns)
        return stored.reshape(self.graph.tensors[name].shape)
