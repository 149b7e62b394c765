"""A machine that is stepped cycle by cycle: queues, counters of tokens, an arbiter. It knows no recurrence."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from accel_sim.program.isa import Halt, Host, Instruction, Load, Program, Store, Sync, Token, Vector
from accel_sim.spec import MachineSpec

KINDS = (Token.LOADED, Token.FREED, Token.COMPUTED, Token.STORED)


@dataclass
class Work:
    """An instruction of the execute queue, or a request of another queue."""

    first: int
    wait: Token
    post: Token
    cycles: int
    local: bool = False
    asked: int = -1
    began: int = -1
    ends: int = -1
    ended: int = -1
    missing: tuple[Token, ...] = ()
    """Tokens that were not there in the last cycle in which its unit was idle and it could not begin."""


@dataclass
class Machine:
    spec: MachineSpec
    log: dict[int, Work] = field(default_factory=dict)

    def run(self, program: Program) -> int:
        """Cycle in which the program ends; ``log``: what happened when, by the index of the first instruction."""
        now, segment = 0, []
        for index, instruction in enumerate(program.code):
            if isinstance(instruction, Sync | Host | Halt):
                now = self._segment(segment, now)
                segment = []
            else:
                segment.append((index, instruction))
        return now

    def _works(self, segment: list[tuple[int, Instruction]]) -> list[list[Work]]:
        queues: list[list[Work]] = [[], [], []]
        bytes_: list[dict[int, int]] = [{}, {}, {}]
        for index, instruction in segment:
            if isinstance(instruction, Vector):
                cycles = ceil(instruction.operations / self.spec.vector.lanes)
                queues[1].append(Work(index, instruction.wait, instruction.post, cycles))
                continue
            assert isinstance(instruction, Load | Store)
            at = 0 if isinstance(instruction, Load) else 2
            local = isinstance(instruction, Store) and instruction.to_scratchpad
            if not instruction.chained:
                queues[at].append(Work(index, instruction.wait, Token.NONE, 0, local))
                bytes_[at][index] = 0
            work = queues[at][-1]
            work.post = instruction.post
            size = instruction.loops.run
            burst = self.spec.dram.burst_bytes
            bytes_[at][work.first] += size if local else ceil(size / burst) * burst
            total = bytes_[at][work.first]
            work.cycles = total if local else ceil(total / self.spec.dram.bytes_per_cycle)
        return queues

    def _segment(self, segment: list[tuple[int, Instruction]], now: int) -> int:
        queues = self._works(segment)
        todo = [list(queue) for queue in queues]
        unended = [list(queue) for queue in queues]
        tokens = dict.fromkeys(KINDS, 0)
        asked: list[tuple[int, int, Work]] = []
        waiting_local: list[Work] = []
        channel_free = now
        array: Work | None = None
        local: Work | None = None
        dram = self.spec.dram
        while any(unended):
            changed = True
            while changed:
                changed = False
                if array is not None and array.ends <= now:
                    array, changed = None, True
                if local is not None and local.ends <= now:
                    local, changed = None, True
                if local is None and waiting_local:
                    local = waiting_local.pop(0)
                    local.began, local.ends = now, now + local.cycles
                    changed = True
                for queue in unended:
                    while queue and 0 <= queue[0].ends <= now:
                        work = queue.pop(0)
                        work.ended = now
                        self.log[work.first] = work
                        for kind in KINDS:
                            tokens[kind] += kind in work.post
                        changed = True
                for at, queue in enumerate(todo):
                    if not queue or (at == 1 and array is not None):
                        continue
                    work = queue[0]
                    if any(kind in work.wait and tokens[kind] == 0 for kind in KINDS):
                        continue
                    for kind in KINDS:
                        tokens[kind] -= kind in work.wait
                    queue.pop(0)
                    work.asked = now
                    changed = True
                    if at == 1:
                        work.began, work.ends = now, now + work.cycles
                        array = work
                    elif work.local:
                        waiting_local.append(work)
                    elif work.cycles == 0:
                        work.began = work.ends = now
                    else:
                        asked.append((now, -at, work))
            if asked and channel_free <= now:
                asked.sort(key=lambda entry: entry[:2])
                work = asked.pop(0)[2]
                work.began, work.ends = now, now + dram.latency_cycles + work.cycles
                channel_free = now + work.cycles if dram.pipelined_requests else work.ends
            if todo[1] and array is None:
                todo[1][0].missing = tuple(kind for kind in KINDS if kind in todo[1][0].wait and not tokens[kind])
            if any(unended):
                now += 1
        return now
