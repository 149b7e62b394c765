"""The event model: load, compute and store of tiles on a double-buffered machine with one DRAM channel.

Step s loads its tiles, computes, and - where it ends an output tile - stores that tile. Rules:

- the load of step s waits until step s - buffers has computed, whose buffer it fills;
- steps compute in order, each after its load;
- a step that begins output tile o waits until tile o - buffers has been stored, whose accumulators it takes;
- the channel carries one transfer at a time, in the order in which they were asked for; where a computed step
  releases both a store and a load, the store goes first.

Under these rules the order of the transfers is fixed: L0 .. L(b-1), then after each step its store, then the load of
the step b further on. All times are maxima and sums over fixed orders, so no transfer that becomes shorter and no
resource that becomes faster can ever make the end later.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from accel_sim.jit import compiled


@compiled
def pipeline_cycles(
    load_cycles: NDArray[np.int64],
    compute_cycles: NDArray[np.int64],
    store_cycles: NDArray[np.int64],
    steps: int,
    buffers: int,
    latency_cycles: int,
    pipelined: int,
    store_on_channel: int,
) -> int:
    """Cycle in which the last of ``steps`` steps has computed and stored. The arrays hold one entry per step.

    ``load_cycles`` and ``store_cycles`` are the channel's data cycles: 0 for a step that loads nothing, or that ends
    no output tile. ``pipelined``: a transfer frees the channel when its data has passed, its latency notwithstanding.
    ``store_on_channel`` 0: the tile goes to the scratchpad on a way of its own, in ``store_cycles`` and no latency.
    """
    load_end = np.zeros(buffers, np.int64)
    store_end = np.zeros(buffers, np.int64)
    channel_free = 0
    for s in range(min(buffers, steps)):
        if load_cycles[s] > 0:
            load_end[s] = channel_free + latency_cycles + load_cycles[s]
            channel_free = channel_free + load_cycles[s] if pipelined else load_end[s]
    compute_end = 0
    last_store_end = 0
    tile = 0
    begins = True
    for s in range(steps):
        slot = s % buffers
        start = max(compute_end, load_end[slot])
        if begins and tile >= buffers:
            start = max(start, store_end[tile % buffers])
        compute_end = start + compute_cycles[s]
        begins = store_cycles[s] > 0
        if begins:
            if store_on_channel:
                start = max(channel_free, compute_end)
                last_store_end = start + latency_cycles + store_cycles[s]
                channel_free = start + store_cycles[s] if pipelined else last_store_end
            else:
                last_store_end = max(last_store_end, compute_end) + store_cycles[s]
            store_end[tile % buffers] = last_store_end
            tile += 1
        if s + buffers < steps:
            load_end[slot] = 0
            if load_cycles[s + buffers] > 0:
                start = max(channel_free, compute_end)
                load_end[slot] = start + latency_cycles + load_cycles[s + buffers]
                channel_free = start + load_cycles[s + buffers] if pipelined else load_end[slot]
    return max(compute_end, last_store_end)
