from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.events import QuietEvents
from codegen.simulate.config import SimulateConfig
from codegen.simulate.machine import parse_machine
from codegen.simulate.output import write_folder
from codegen.simulate.run import Outcome, simulate
from codegen.simulate.sweep import parse_axes
from tests.codegen.simulate.networks import DIGITS, images

Simulate = Callable[..., Outcome]


def carry_out(model: Path, *targets: str, sweep: tuple[str, ...] = (), **options: Any) -> Outcome:
    machines = tuple(parse_machine(target) for target in targets or ("asic",))
    return simulate(SimulateConfig(model, machines, axes=parse_axes(sweep), **options), QuietEvents())


@pytest.fixture(scope="session")
def run_simulation() -> Simulate:
    return carry_out


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Everything that ``-o`` writes for the digits' network with five images, and its report."""
    folder = tmp_path_factory.mktemp("digits")
    np.savez(folder / "x.npz", image=images(5))
    outcome = carry_out(DIGITS, inputs=str(folder / "x.npz"), calibration=str(folder / "x.npz"))
    return folder / "out", write_folder(outcome, folder / "out")
