"""What matrix products read and write: rules of their operands, and the parts of stored maps that they use."""

from __future__ import annotations

import numpy as np

from accel_sim.program.accesses import ACCUMULATOR, SCRATCHPAD, Accesses
from accel_sim.program.code_order import Code, Flags, Ints, check_table_index, refuse
from accel_sim.program.isa import Dataflow, Program, Queue
from accel_sim.program.memories import Memories, at_least, product, window_columns
from accel_sim.program.record_layouts import Opcode


def check_matmuls(program: Program, code: Code, memories: Memories) -> None:
    at, matmuls = code.only(Opcode.MATMUL)
    check_table_index(at, matmuls["window"], "window", len(program.windows))
    fields = {name: matmuls[name].astype(np.int64) for name in matmuls.dtype.names}
    for name, smallest in (("channels", 1), ("filters", 1), ("first_channel", 0), ("bias_address", -1)):
        at_least(at, fields[name], name, smallest)
    if not len(at):
        return
    window = window_columns(program, matmuls["window"])
    first, channels, filters = fields["first_channel"], fields["channels"], fields["filters"]
    refuse(
        first + channels > window["channels"],
        at,
        lambda place: (
            f"channels {first[place]} to {first[place] + channels[place]}; the stored map has "
            f"{window['channels'][place]}"
        ),
    )
    refuse(
        (fields["accumulate"] == 1) & (fields["bias_address"] != -1),
        at,
        lambda place: f"accumulates, and bias_address is {fields['bias_address'][place]}; expected -1",
    )
    stored = product(window["images"], window["channels"], window["positions"])
    address = fields["input_address"]
    memories.add("input", at, SCRATCHPAD, False, address, stored, limits=memories.inputs, used=False)
    weights = product(window["taps"], channels, filters)
    address = fields["weight_address"]
    memories.add("weights", at, SCRATCHPAD, False, address, weights, limits=memories.weights)
    biased = fields["bias_address"] >= 0
    size, address = (filters * memories.word_bytes)[biased], fields["bias_address"][biased]
    memories.add("biases", at[biased], SCRATCHPAD, False, address, size, limits=memories.weights)
    memories.check_aligned(at, fields["accumulator_address"])
    size = product(window["images"], window["outputs"], filters, np.full(len(at), memories.word_bytes))
    memories.add("sums", at, ACCUMULATOR, True, fields["accumulator_address"], size)
    _collect_operands(program.columns, code, at, window, fields, weights, memories.accesses)


def _collect_operands(
    columns: int,
    code: Code,
    at: Ints,
    window: dict[str, Ints],
    fields: dict[str, Ints],
    weights: Ints,
    accesses: Accesses,
) -> None:
    """What matmuls read of their maps; what their preloads read of the operand that stays in the array."""
    preloads = _preloads(code, at)
    inputs_stay = fields["dataflow"] == Dataflow.INPUT_STATIONARY
    for of, base, run, counts, strides in _map_reads(columns, window, fields):
        accesses.add(at[of], SCRATCHPAD, False, base, run, counts, strides)
        early = (preloads[of] >= 0) & inputs_stay[of]
        accesses.add(preloads[of][early], SCRATCHPAD, False, base[early], run[early], counts[early], strides[early])
    early = (preloads >= 0) & ~inputs_stay
    accesses.add(preloads[early], SCRATCHPAD, False, fields["weight_address"][early], weights[early])


def _preloads(code: Code, at: Ints) -> Ints:
    """The preload of each matmul, or -1."""
    execute = np.flatnonzero(code.queue == Queue.EXECUTE)
    place = np.searchsorted(execute, at)
    before = execute[np.maximum(place - 1, 0)]
    is_preload = (place > 0) & (code.table["opcode"][before] == Opcode.PRELOAD)
    return np.where(is_preload, before, -1)


def _map_reads(
    columns: int, window: dict[str, Ints], fields: dict[str, Ints]
) -> list[tuple[Flags, Ints, Ints, Ints, Ints]]:
    """What matmuls read of their stored maps: up to three strided sets each, as (which, base, run, counts, strides).

    In the blocks of the channels that are read, the box of positions from the first to the last tap of each axis.
    """
    reach = (window["out"] - 1) * window["strides"] + (window["kernel"] - 1) * window["dilations"] + window["origin"]
    low, high = np.maximum(window["origin"], 0), np.minimum(reach, window["extent"] - 1)
    some = (low <= high).all(axis=1)
    deep, tall, long = (np.maximum(high - low, 0) + 1).T
    _, height, width = window["extent"].T
    positions, images = window["positions"], window["images"]
    corner = (low[:, 0] * height + low[:, 1]) * width + low[:, 2]
    first, last = fields["first_channel"], fields["first_channel"] + fields["channels"]
    one = np.ones_like(first)

    def box(block: Ints, blocks: Ints, lane: Ints, lanes: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """``lanes`` of the blocks from ``block`` on; loops over images, blocks, depth, height, width."""
        wide = np.minimum(columns, window["channels"] - block * columns)
        base = fields["input_address"] + block * columns * positions + corner * wide + lane
        whole = lanes == wide
        lines = whole & (long == width)  # then lines follow each other without a gap, and so may planes
        planes = lines & (tall == height)
        run = lanes * np.where(whole, long, 1) * np.where(lines, tall, 1) * np.where(planes, deep, 1)
        loops = (images, blocks, np.where(planes, 1, deep), np.where(lines, 1, tall), np.where(whole, 1, long))
        steps = (window["channels"] * positions, columns * positions, height * width * wide, width * wide, wide)
        return base, run, np.stack(loops, axis=1), np.stack(steps, axis=1)

    ragged = first % columns != 0
    rest = np.where(ragged, np.minimum(last, (first // columns + 1) * columns), first)
    full = (last - rest) // columns
    tail = rest + full * columns
    found = []
    for chosen, sets in (
        (some & ragged, box(first // columns, one, first % columns, rest - first)),
        (some & (full > 0), box(rest // columns, full, 0 * one, columns * one)),
        (some & (tail < last), box(tail // columns, one, 0 * one, last - tail)),
    ):
        base, run, counts, strides = (part[chosen] for part in sets)
        found.append((chosen, base, run, counts, strides))
    return found
