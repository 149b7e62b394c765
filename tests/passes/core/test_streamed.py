"""The SVD that leaves a weight in its file, against NumPy's of the whole matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from passes.core.formats.channel_svd import ChannelSvdIn, ChannelSvdOut
from passes.core.formats.spatial_svd import SpatialSvd
from passes.core.formats.svd import Svd
from passes.core.formats.tucker2 import Tucker2
from passes.core.mapped import is_mapped
from passes.core.site import Array, Geometry, Stage, compose
from passes.core.streamed import StreamedSvd, streams


def falling(rows: int, columns: int, seed: int) -> Array:
    """A float32 matrix whose singular values fall to a twentieth."""
    rng = np.random.default_rng(seed)
    full = min(rows, columns)
    u, v = (np.linalg.qr(rng.standard_normal((n, full)))[0] for n in (rows, columns))
    return ((u * np.linspace(1, 0.05, full)) @ v.T).astype(np.float32)


def mapped(matrix: Array, folder: Path, order: str) -> Array:
    """The matrix in a file, read-only; with ``order`` F its columns lie together, as Gemm's do without transB."""
    path = folder / "weight.bin"
    path.write_bytes(np.ascontiguousarray(matrix if order == "C" else matrix.T).tobytes())
    stored = np.memmap(path, np.float32, "r", shape=matrix.shape if order == "C" else matrix.shape[::-1])
    return stored if order == "C" else stored.T


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(30, 140), (140, 30), (61, 67)])
def test_each_rank_is_the_best_of_its_rank(shape: tuple[int, int], order: str, tmp_path: Path) -> None:
    weight = falling(*shape, seed=0)
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2
    streamed = StreamedSvd.of(Svd(), Stage(mapped(weight, tmp_path, order), None))
    assert streamed.full_rank == (min(shape),)
    assert np.isclose(streamed.energy(), values.sum(), rtol=1e-5, atol=0)
    for rank in (1, 7, min(shape) - 1):
        left_over = values[rank:].sum()
        # float32 Gram sides carry an error of about eps x the largest squared singular value, which is 1 here
        assert np.isclose(streamed.loss((rank,)), left_over, rtol=1e-4, atol=1e-5)
        stages = streamed.stages((rank,))
        assert all(is_mapped(stage.weight) and stage.weight.dtype == np.float32 for stage in stages)
        assert [stage.weight.shape for stage in stages] == [(rank, shape[1]), (shape[0], rank)]
        missed = stages[1].weight.astype(np.float64) @ stages[0].weight - weight
        assert np.isclose(np.sum(missed**2), left_over, rtol=1e-4, atol=1e-6)
    inner, outer = streamed.stages((min(shape),))
    assert np.abs(outer.weight @ inner.weight - weight).max() < 1e-5


def test_kernels_and_groups_go_to_the_first_stage(tmp_path: Path) -> None:
    geometry = Geometry((3, 3), (2, 1), (1, 1), (1, 0, 1, 0), groups=2)
    weight = np.stack([falling(12, 45, seed) for seed in (1, 2)]).reshape(24, 5, 3, 3)
    stage = Stage(weight, None, geometry)
    inner, outer = StreamedSvd.of(ChannelSvdOut(), stage).stages((12,))
    assert inner.geometry == geometry and outer.geometry == Geometry.pointwise(2, 2)
    assert (inner.weight.shape, outer.weight.shape) == ((24, 5, 3, 3), (24, 12, 1, 1))
    assert np.abs(compose((inner, outer)).reshape(weight.shape) - weight).max() < 1e-5


def test_a_rank_beyond_the_full_one_is_an_error() -> None:
    streamed = StreamedSvd.of(Svd(), Stage(falling(4, 6, 0), None))
    for rank in (0, 5):
        with pytest.raises(ValueError, match="is not within 1 and"):
            streamed.stages((rank,))


def test_formats_that_split_the_patch_are_not_streamed() -> None:
    assert streams(Svd()) and streams(ChannelSvdOut())
    assert not any(streams(f) for f in (ChannelSvdIn(), SpatialSvd("spatial_svd_vh"), Tucker2()))
