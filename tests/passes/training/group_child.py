"""One process of two: ``torchrun ... -m tests.passes.training.group_child FOLDER [fail]``."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from passes.errors import RankcError
from passes.training.devices import joined
from passes.training.objective import CrossEntropy
from passes.training.trainer import Step, Trainer
from tests.passes.training.small_runs import EVERYTHING, ScaledCrossEntropy, images, normed_network, options
from tests.passes.training.small_runs import plain_network as plain

torch.set_num_threads(1)
folder = Path(sys.argv[1])


class Stopped(Exception):
    pass


def stop_at(number: int, by: type[Exception] = Stopped):  # type: ignore[no-untyped-def]
    def on_step(step: Step) -> None:
        if step.number == number:
            raise by

    return on_step


def vanish(step: Step) -> None:
    if step.number == 3:
        os._exit(1)


with joined("cpu", timeout_s=60) as group:
    found = {}
    if "fail" in sys.argv:
        try:
            on_step = vanish if group.rank else lambda step: None
            Trainer(plain(), CrossEntropy(), images(), options(), group=group, on_step=on_step).run()
        except RankcError as error:
            (folder / f"error_{group.rank}.txt").write_text(str(error))
            os._exit(0)  # the group cannot be left in order any more
        os._exit(2)
    # the seeds differ: every process must start from the leader's weights
    network = plain(seed=group.rank)
    run = Trainer(network, CrossEntropy(), images(), options(batch=31), folder / f"a{group.rank}", group).run()
    found["plain"], losses = network.state_dict(), [epoch.loss for epoch in run.epochs]

    # without a break, and stopped in the midst of the second epoch; one folder for both processes
    whole = normed_network()
    full = Trainer(whole, ScaledCrossEntropy(), images(), options(**EVERYTHING), group=group).run()
    found["whole"] = whole.state_dict()
    with suppress(Stopped):
        Trainer(
            normed_network(), ScaledCrossEntropy(), images(), options(**EVERYTHING), folder / "b", group,
            on_step=stop_at(5), checkpoint_s=0.0,
        ).run()  # fmt: skip
    steps: list[int] = []
    again = normed_network()
    resumed = Trainer(
        again, ScaledCrossEntropy(), images(), options(**EVERYTHING), folder / "b", group,
        on_step=lambda step: steps.append(step.number),
    ).run()  # fmt: skip
    found["again"] = again.state_dict()
    try:
        Trainer(plain(), CrossEntropy(), images(), options(), folder / "b", group).run()
        refused = ""
    except RankcError as error:
        refused = str(error)
    torch.save(found, folder / f"{group.rank}.pt")
    told = {
        "losses": losses, "steps": steps, "best": [full.best, resumed.best], "refused": refused,
        "held_out": [[epoch.held_out for epoch in run.epochs] for run in (full, resumed)],
    }  # fmt: skip
    (folder / f"{group.rank}.json").write_text(json.dumps(told))
