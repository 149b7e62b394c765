"""MetaSchedule's own spaces over our kernels: traces are drawn from them, kept as texts, and replayed in a network.

A trace is drawn for a layer with its bias and clamp, and is replayed wherever the layer stands. What is computed behind
it there is one block then, as it was when the trace was drawn; only its name differs, for which the text has a word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from codegen.tune.device import Device
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from codegen.tvm_kernels.anchor import Anchored, DoesNotFit
from codegen.tvm_kernels.imports import load_tvm, quick_imports

TEMPLATE = "metaschedule"
_LAST = "@last"

Sketch = Any  # tvm.s_tir.Schedule


def bare_schedule(workload: Workload, device: Device, text: str = "") -> Schedule:
    """The schedule of a trace. Weights are laid out for it as for tiles of one channel, or a vector's in a product."""
    if workload.work.geometry.ndim:
        return Schedule.of(TEMPLATE, oc=1, th=1, tw=1, trace=text)
    return Schedule.of(TEMPLATE, oc=device.lanes, tw=1, trace=text)


def schedule_by_trace(a: Anchored, device: Device) -> None:
    """The template: replays the trace of the anchor's schedule. TVM's errors where it does not fit the function."""
    text = str(a.schedule["trace"])
    if not text:
        raise DoesNotFit("a trace without instructions")
    apply_trace(a.sketch, a.sketch.get(a.last).name_hint, text)


def apply_trace(sketch: Sketch, last: str, text: str) -> None:
    """Replays a trace's ``text`` on ``sketch``, in which the block named ``last`` computes the output."""
    from tvm.s_tir.schedule import Trace

    instructions, decisions = json.loads(text)
    Trace.apply_json_to_schedule([_renamed(instructions, _LAST, last), decisions], sketch)


def to_text(trace: Any, last: str) -> str:
    """The trace for every function in which another block may stand in the place of ``last``."""
    instructions, decisions = json.loads(_json(trace))
    return json.dumps([_renamed(instructions, last, _LAST), decisions], separators=(",", ":"))


def draw(
    workload: Workload,
    device: Device,
    known: Sequence[tuple[Schedule, float]],
    count: int,
    *,
    evolutionary: bool,
    seed: int,
) -> list[Schedule]:
    """At most ``count`` schedules that are not among the ``known`` ones with their seconds; [] where none is found.

    At random from the space (``replay-trace``), or by mutation of the fastest ones that are known (``evolutionary``,
    with a population of 32, as the default one of 512 takes a minute of processor time).
    """
    load_tvm()
    with quick_imports():
        import tvm.s_tir.tensor_intrin  # a context imports it otherwise, at leisure
        from tvm.s_tir import meta_schedule as ms
    from codegen.tvm_kernels.build import anchored_kernel

    anchored = anchored_kernel(workload, bare_schedule(workload, device), device)
    mod, last = anchored.sketch.mod, anchored.sketch.get(anchored.last).name_hint
    target = tvm.target.Target(device.target)
    strategy = ms.search_strategy.ReplayTrace(max_fail_count=100)
    if evolutionary:
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=32, init_min_unmeasured=8, max_fail_count=10, genetic_num_iters=3, eps_greedy=0.25
        )
    context = ms.TuneContext(
        mod=mod,
        target=target,
        space_generator=ms.space_generator.PostOrderApply(),
        search_strategy=strategy,
        task_name="main",
        rand_state=seed % (2**31 - 2) + 1,
        num_threads=1,
    )
    database = ms.database.MemoryDatabase()
    committed = database.commit_workload(mod)
    texts = set()
    for schedule, seconds in known:
        if schedule.template != TEMPLATE:
            continue
        text = str(schedule["trace"])
        texts.add(text)
        sketch = tvm.s_tir.Schedule(mod)
        apply_trace(sketch, last, text)
        arguments = ms.arg_info.ArgInfo.from_entry_func(mod, remove_preproc=False)
        database.commit_tuning_record(ms.database.TuningRecord(sketch.trace, committed, [seconds], target, arguments))
    context.pre_tuning(
        max_trials=2**31 - 1,
        num_trials_per_iter=count,
        design_spaces=context.generate_design_space(),
        database=database,
        cost_model=ms.cost_model.RandomModel(seed=seed % 2**31),
    )
    found: dict[str, None] = {}
    for _ in range(4):  # few spaces are so small that all was drawn before
        for candidate in context.generate_measure_candidates() or []:
            text = to_text(candidate.sch.trace, last)
            if text not in texts:
                found[text] = None
        if len(found) >= count or evolutionary:
            break
    context.post_tuning()
    return [bare_schedule(workload, device, text) for text in list(found)[:count]]


def _json(trace: Any) -> str:
    value = trace.as_json(remove_postproc=False)
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    """TVM's own numbers, texts and lists as Python's."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if hasattr(value, "value"):
        return value.value
    return [_plain(part) for part in value]


def _renamed(instructions: list[Any], old: str, new: str) -> list[Any]:
    """Instructions are [kind, inputs, attributes, outputs]; a block is found by its name."""
    return [
        [kind, inputs, [new, *rest[1:]] if kind == "GetSBlock" and rest[0] == old else rest, outputs]
        for kind, inputs, rest, outputs in instructions
    ]
