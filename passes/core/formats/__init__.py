"""The factor formats. Each is one file; :data:`FORMATS` lists them by name in the order of preference at equal cost."""

from __future__ import annotations

from passes.core.factor import FactorFormat
from passes.core.formats.channel_svd import ChannelSvdIn, ChannelSvdOut
from passes.core.formats.spatial_svd import SpatialSvd
from passes.core.formats.svd import Svd
from passes.core.formats.tucker2 import Tucker2

_ALL: tuple[FactorFormat, ...] = (
    Svd(),
    ChannelSvdOut(),
    ChannelSvdIn(),
    SpatialSvd(name="spatial_svd_vh"),
    SpatialSvd(name="spatial_svd_hv"),
    Tucker2(),
)
FORMATS: dict[str, FactorFormat] = {format.name: format for format in _ALL}

__all__ = ["FORMATS", "ChannelSvdIn", "ChannelSvdOut", "SpatialSvd", "Svd", "Tucker2"]
