"""Transfers: strided boxes of memory, and how many contiguous runs of DRAM they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def contiguous_runs(shapes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(length in bytes, number) of the maximal contiguous DRAM runs of each transfer.

    ``shapes`` is (transfers, 7): run, three counts and three DRAM strides, outermost first. A loop whose stride is the
    extent of what lies inside continues it; from the first that does not on, every repetition is a run of its own.
    """
    length = shapes[:, 0].copy()
    number = np.ones(len(shapes), np.int64)
    open_ = np.ones(len(shapes), np.bool_)
    for loop in (2, 1, 0):
        times, stride = shapes[:, 1 + loop], shapes[:, 4 + loop]
        extends = open_ & ((times == 1) | (stride == length))
        length = np.where(extends, length * times, length)
        number = np.where(extends, number, number * times)
        open_ &= extends
    number[length == 0] = 0
    length[number == 0] = 0
    return length, number
