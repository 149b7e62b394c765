"""Which workloads can learn from each other, and how near they are."""

from __future__ import annotations

from functools import lru_cache
from math import log2, prod

from codegen.tune.workload import Workload


def family(workload: Workload) -> str:
    """Workloads of one family have the same loops: ``conv 2-D grouped float32``, ``depthwise``, ``linear``, ..."""
    work, geometry = workload.work, workload.work.geometry
    if not geometry.ndim:
        return f"linear {workload.dtype}"
    op = "conv_transpose" if geometry.transposed else "conv"
    if geometry.groups == 1:
        kind = "pointwise" if prod(geometry.kernel) == 1 else "dense"
    else:
        kind = "depthwise" if geometry.groups == work.in_channels else "grouped"
    return f"{op} {geometry.ndim}-D {kind} {workload.dtype}"


def distance(first: Workload, second: Workload) -> float:
    """Sum of the differences of the log2 of their sizes; 0 only where every size that shapes a loop is equal.

    Both of one :func:`family`.
    """
    return sum(abs(a - b) for a, b in zip(_log_sizes(first), _log_sizes(second), strict=True))


@lru_cache(maxsize=1 << 16)
def _log_sizes(workload: Workload) -> tuple[float, ...]:
    """log2 of the loops' extents, and of what else decides how memory is walked."""
    work, geometry = workload.work, workload.work.geometry
    sizes = (
        work.batch,
        work.in_channels // geometry.groups,
        work.out_channels // geometry.groups,
        geometry.groups,
        *(max(size, 1) for size in work.output_spatial),
        *geometry.kernel,
        *geometry.strides,
        *geometry.dilations,
    )
    return tuple(map(log2, sizes))
