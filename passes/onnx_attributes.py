"""A node's attributes as the walk's operators read them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from onnx import NodeProto, helper


class Attributes:
    """A node's attributes by name. ``outputs``: how many it has."""

    def __init__(self, node: NodeProto) -> None:
        self._values = {a.name: _decoded(helper.get_attribute_value(a)) for a in node.attribute}
        self.outputs = len(node.output)

    def get(self, name: str, default: Any) -> Any:
        return self._values.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def pads(self, ndim: int) -> Sequence[int] | None:
        """Explicit pads, begins then ends; None where the node leaves them to auto_pad."""
        if self.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return None
        return list(self.get("pads", [0] * (2 * ndim)))

    def changed(self, **values: Any) -> Attributes:
        """The same with other values."""
        other = copy.copy(self)
        other._values = {**self._values, **values}
        return other


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
