"""A program's code in columns, and the rules of its order: barriers, tokens of a queue, chains, preloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_sim.program.errors import ProgramError
from accel_sim.program.isa import Dataflow, Program, Queue, Token
from accel_sim.program.record_layouts import INSTRUCTIONS, QUEUE_OF, Opcode
from accel_sim.program.records import Table, code_table
from accel_sim.spec import MachineSpec

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

BARRIER = 3
"""Beside the queues of :class:`Queue`: where all meet."""

MAY_WAIT = (Token.FREED, Token.LOADED | Token.STORED, Token.COMPUTED, Token.NONE)
MAY_POST = (Token.LOADED, Token.FREED | Token.COMPUTED, Token.STORED, Token.NONE)
"""By queue; see the table in :mod:`accel_sim.program.isa`."""

DATAFLOW_NAMES = {
    Dataflow.WEIGHT_STATIONARY: "ws",
    Dataflow.OUTPUT_STATIONARY: "os",
    Dataflow.INPUT_STATIONARY: "is",
}


@dataclass(frozen=True)
class Code:
    """A program's code in columns: one entry per instruction. ``chained`` and ``local`` are of loads and stores."""

    table: Table
    queue: Ints
    wait: Ints
    post: Ints
    chained: Flags
    local: Flags

    @staticmethod
    def of(program: Program) -> Code:
        table = code_table(program)
        queues = np.full(max(Opcode) + 1, BARRIER)
        for opcode, queue in QUEUE_OF.items():
            queues[opcode] = BARRIER if queue is None else queue
        opcodes = table["opcode"]
        loads, stores = (table.view(INSTRUCTIONS[opcode].dtype) for opcode in (Opcode.LOAD, Opcode.STORE))
        load, store = opcodes == Opcode.LOAD, opcodes == Opcode.STORE
        return Code(
            table,
            queues[opcodes].astype(np.int64),
            table["wait"].astype(np.int64),
            table["post"].astype(np.int64),
            (load & (loads["chained"] == 1)) | (store & (stores["chained"] == 1)),
            store & (stores["to_scratchpad"] == 1),
        )

    def __len__(self) -> int:
        return len(self.table)

    def only(self, opcode: Opcode) -> tuple[Ints, Any]:
        """Indices and records of the instructions of one opcode."""
        at = np.flatnonzero(self.table["opcode"] == opcode)
        raw = self.table.view(np.uint8).reshape(len(self.table), -1)
        return at, raw[at].view(INSTRUCTIONS[opcode].dtype)[:, 0]


def check_order(program: Program, spec: MachineSpec, code: Code) -> None:
    """Raises :class:`ProgramError` for the first rule that is broken."""
    _check_barriers(program, code)
    _check_tokens(code, "wait", code.wait, MAY_WAIT)
    _check_tokens(code, "post", code.post, MAY_POST)
    _check_chains(code, Queue.LOAD)
    _check_chains(code, Queue.STORE)
    _check_preloads(code)
    _check_dataflows(spec, code)


def refuse(bad: Flags, at: Ints, message: Callable[[int], str]) -> None:
    """ProgramError for the first instruction of ``at`` for which ``bad`` holds; ``message`` is given its place."""
    if bad.any():
        place = int(np.argmax(bad))
        raise ProgramError(message(place), "code", int(at[place]))


def check_table_index(at: Ints, values: NDArray[Any], name: str, count: int, smallest: int = 0) -> None:
    expected = "" if smallest == 0 else f", or {smallest}"
    refuse(
        (values < smallest) | (values >= count),
        at,
        lambda place: f"{name} is {values[place]}; the program has {count}, expected 0 to {count - 1}{expected}",
    )


def token_names(tokens: int) -> str:
    """Names of a set of tokens, as listings have them."""
    return ",".join(str(token.name).lower() for token in Token if token & tokens) or "none"


def _check_barriers(program: Program, code: Code) -> None:
    halts = np.flatnonzero(code.table["opcode"] == Opcode.HALT)
    last = len(code) - 1
    if not len(halts) or halts[-1] != last:
        raise ProgramError("the last instruction is no halt", "code", max(last, 0))
    if len(halts) > 1:
        raise ProgramError(f"a halt; expected the only one at {last}, the end", "code", int(halts[0]))
    for opcode, name, section in ((Opcode.SYNC, "marker", program.markers), (Opcode.HOST, "call", program.calls)):
        at, records = code.only(opcode)
        check_table_index(at, records[name], name, len(section))


def _check_tokens(code: Code, name: str, given: Ints, allowed: tuple[Token, ...]) -> None:
    masks = np.array([int(tokens) for tokens in allowed])[code.queue]
    refuse(
        (given & ~masks) != 0,
        np.arange(len(code)),
        lambda place: (
            f"{name} is {token_names(int(given[place]))}; the {Queue(int(code.queue[place])).name.lower()} queue "
            f"may {name} {token_names(int(masks[place]))}"
        ),
    )


def _check_chains(code: Code, queue: Queue) -> None:
    at = np.flatnonzero((code.queue == queue) | (code.queue == BARRIER))
    chained, wait, post, local = code.chained[at], code.wait[at], code.post[at], code.local[at]
    after_barrier = np.append(True, code.queue[at[:-1]] == BARRIER)
    refuse(chained & after_barrier, at, lambda _: f"chained, and no {queue.name.lower()} stands before it")
    refuse(
        chained & (wait != 0),
        at,
        lambda place: f"chained, and wait is {token_names(int(wait[place]))}; expected none",
    )
    refuse(
        np.append(chained[1:], False) & (post != 0),
        at,
        lambda place: f"post is {token_names(int(post[place]))}, and {at[place + 1]} is chained to it; expected none",
    )
    refuse(
        chained & (local != np.append(False, local[:-1])),
        at,
        lambda place: f"chained to {at[place - 1]}, which does not go the same way",
    )


def _check_preloads(code: Code) -> None:
    at = np.flatnonzero((code.queue == Queue.EXECUTE) | (code.queue == BARRIER))
    opcodes = code.table["opcode"][at]
    following = np.append(opcodes[1:], 0)
    preload = opcodes == Opcode.PRELOAD
    refuse(
        preload & (following != Opcode.MATMUL),
        at,
        lambda place: "a preload; expected a matmul as the next instruction of the execute queue",
    )
    matmuls = code.table.view(INSTRUCTIONS[Opcode.MATMUL].dtype)
    dataflow = np.append(matmuls["dataflow"][at[1:]], 0)
    refuse(
        preload & (dataflow == Dataflow.OUTPUT_STATIONARY),
        at,
        lambda place: f"a preload, but {at[place + 1]} is output-stationary and has nothing to preload",
    )


def _check_dataflows(spec: MachineSpec, code: Code) -> None:
    at, matmuls = code.only(Opcode.MATMUL)
    dataflow = matmuls["dataflow"]
    refuse(
        ~np.isin(dataflow, [int(flow) for flow, name in DATAFLOW_NAMES.items() if name in spec.array.dataflows]),
        at,
        lambda place: (
            f"dataflow is {DATAFLOW_NAMES[Dataflow(int(dataflow[place]))]}; {spec.name!r} has "
            f"{', '.join(spec.array.dataflows)}"
        ),
    )
