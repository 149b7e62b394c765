"""What can be said of times that were measured on a machine that does other things too.

Whatever disturbs a call makes it longer. So the minimum of many calls is what the code takes, and it comes back within
1 % on a busy machine where the mean moves fourfold; the tenth percentile and the median stand beside it to show how
disturbed the machine was.

Two programs are compared by interleaved blocks: some calls of the one, some of the other, and again. A block's minimum
removes short disturbances; the ratio of the two minima of a pair of blocks removes what lasts longer than both, such as
the processor's frequency. The interval for the ratio is the exact one for the median of the pairs' ratios (order
statistics with binomial probabilities; W. R. Thompson, Annals of Mathematical Statistics 7, 1936). It assumes nothing
but that the pairs are independent; a bootstrap of minima, whose distribution it cannot imitate, assumes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
"""Of the intervals that results are judged by and reported with."""

LEAST_BLOCKS = 6
"""Fewer pairs give no interval of 95 %: the widest, from the least to the largest ratio, holds 1 - 2^(1 - pairs)."""


@dataclass(frozen=True)
class Summary:
    """Seconds of single calls: the minimum, the tenth percentile (a value that occurred) and the median."""

    seconds: float
    p10: float
    median: float


def summary(samples: Sequence[float]) -> Summary:
    """Of at least one call; ValueError for none, or for a time that is not finite and above zero."""
    if not samples:
        raise ValueError("no call was timed")
    values = np.sort(np.asarray(samples, np.float64))
    if not (np.isfinite(values).all() and values[0] > 0):
        raise ValueError("a call took no time, or no finite one")
    return Summary(float(values[0]), float(values[ceil(len(values) / 10) - 1]), float(np.median(values)))


@dataclass(frozen=True)
class Ratio:
    """Time of one program divided by that of another, and the interval that holds it with ``confidence``."""

    value: float
    low: float
    high: float
    confidence: float

    @property
    def gain(self) -> bool:
        """The first program is faster, with that confidence."""
        return self.high < 1.0

    @property
    def loss(self) -> bool:
        """The first program is slower, with that confidence."""
        return self.low > 1.0

    @property
    def margin(self) -> float:
        """Relative gain below which a ratio measured in this noise says nothing: one of 1 - margin is just a gain."""
        return 1.0 - self.value / self.high


def ratio(first: ArrayLike, second: ArrayLike, confidence: float) -> Ratio:
    """``first`` / ``second``: seconds of single calls, (blocks, calls) each, block i of one measured beside block i
    of the other.

    ValueError for numbers of blocks that differ or are too small for the confidence.
    """
    ratios = np.sort(_minima(first) / _minima(second, len(np.asarray(first))))
    count = len(ratios)
    outside = _outside(count, confidence)
    return Ratio(float(np.median(ratios)), float(ratios[outside]), float(ratios[count - 1 - outside]), confidence)


def noise_margin(samples: ArrayLike, confidence: float) -> float:
    """The least relative gain that could be told from none, from one program measured in (blocks, calls).

    The program is compared with itself: even blocks with the odd ones next to them.
    """
    values = np.asarray(samples, np.float64)
    pairs = len(values) // 2
    against = ratio(values[: 2 * pairs : 2], values[1 : 2 * pairs : 2], confidence)
    # Either half could have been the slower one, so the margin counts from no difference and not from the one found.
    return max(1.0 - against.low, 1.0 - 1.0 / against.high, 0.0)


def _minima(samples: ArrayLike, blocks: int | None = None) -> NDArray[np.float64]:
    values = np.asarray(samples, np.float64)
    if values.ndim != 2 or not values.size or (blocks is not None and len(values) != blocks):
        raise ValueError(f"samples of shape {values.shape}: as many blocks of calls are needed of both programs")
    if not (np.isfinite(values).all() and values.min() > 0):
        raise ValueError("a call took no time, or no finite one")
    minima: NDArray[np.float64] = values.min(axis=1)
    return minima


def _outside(count: int, confidence: float) -> int:
    """How many ratios may lie outside on either side: the most for which the interval keeps its confidence."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is none; it lies between 0 and 1")
    allowed = (1.0 - confidence) / 2.0
    below, outside = 0.0, 0
    while outside < count // 2 and (below := below + comb(count, outside) / 2.0**count) <= allowed:
        outside += 1
    if outside == 0:
        raise ValueError(f"{count} blocks are too few for an interval of {confidence:.0%}")
    return outside - 1
