"""Trains until a step and is killed there: python -m tests.passes.training.killed_child FOLDER STEP."""

import os
import signal
import sys
from pathlib import Path

import torch

from passes.training.trainer import Step, Trainer
from tests.passes.training.small_runs import EVERYTHING, ScaledCrossEntropy, images, normed_network, options

torch.set_num_threads(1)
last = int(sys.argv[2])


def on_step(step: Step) -> None:
    if step.number == last:
        os.kill(os.getpid(), signal.SIGKILL)


Trainer(
    normed_network(), ScaledCrossEntropy(), images(), options(**EVERYTHING), Path(sys.argv[1]), on_step=on_step,
    checkpoint_s=0.0,
).run()  # fmt: skip
