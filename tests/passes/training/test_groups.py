"""Two processes train as one would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.errors import InputError, UsageError
from passes.training.devices import ALONE, Group, joined
from passes.training.objective import CrossEntropy
from passes.training.trainer import Trainer
from tests.passes.training.small_runs import images, options, plain_network

ROOT = Path(__file__).resolve().parents[3]
CHILD = "tests.passes.training.group_child"


@pytest.fixture(scope="module")
def group_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", CHILD,
        str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def told(group_folder: Path) -> list[dict[str, Any]]:
    return [json.loads((group_folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def states(group_folder: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    return [torch.load(group_folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("which", ["plain", "whole", "again"])
def test_both_processes_end_with_the_same_weights(which: str, states: list[dict[str, Any]]) -> None:
    for name, value in states[0][which].items():
        assert torch.equal(value, states[1][which][name]), name


def test_they_are_those_of_one_process_on_the_same_batches(states: list[Any], told: list[dict[str, Any]]) -> None:
    """A batch of 31 is shared as 16 and 15: only a mean weighted by these is the gradient of the batch."""
    torch.set_num_threads(1)
    alone = plain_network()
    run = Trainer(alone, CrossEntropy(), images(), options(batch=31)).run()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(states[0]["plain"][name], value, rtol=1e-4, atol=1e-6)
    for theirs in told:
        assert theirs["losses"] == pytest.approx([epoch.loss for epoch in run.epochs], rel=1e-5)
        assert theirs["losses"][-1] < theirs["losses"][0]


def test_stopped_and_resumed_together(states: list[Any], told: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert told[rank]["steps"][0] == 5
        assert told[rank]["best"][0] == told[rank]["best"][1]
        assert told[rank]["held_out"][0] == told[rank]["held_out"][1] == told[0]["held_out"][0]
        for name, value in states[rank]["whole"].items():
            assert torch.equal(value, states[rank]["again"][name]), name


def test_only_the_leader_writes(group_folder: Path) -> None:
    assert (group_folder / "a0" / "training.pt").is_file()
    assert not (group_folder / "a1").exists()
    assert [p.name for p in (group_folder / "b").iterdir()] == ["training.pt"]


def test_another_runs_checkpoint_is_refused_in_every_process(told: list[dict[str, Any]]) -> None:
    assert told[0]["refused"] == told[1]["refused"]
    assert "holds the checkpoint of another run" in told[0]["refused"]


def test_a_process_that_vanishes_ends_the_others_with_an_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", CHILD, str(tmp_path), "fail"],
            cwd=ROOT, env={**os.environ, **place, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 1], ends
    error = (tmp_path / "error_0.txt").read_text()
    assert error.startswith("another process of this run is gone") and "\n" not in error


def test_a_batch_that_is_too_small_to_be_shared_is_refused() -> None:
    group = Group(0, 4, torch.device("cpu"))
    with pytest.raises(InputError, match="a batch of 3 samples cannot be shared by 4 processes"):
        Trainer(plain_network(), CrossEntropy(), images(), options(batch=3), group=group).run()


def test_alone_nothing_is_exchanged() -> None:
    with joined("cpu") as group:
        assert group == ALONE and group.leads
    assert ALONE.bytes_from_leader(b"x") == b"x"
    assert ALONE.sum(torch.tensor([2.0])).tolist() == [2.0]


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "mps", ""])
def test_unknown_devices_are_named(device: str) -> None:
    with pytest.raises(UsageError, match="there are auto, cpu, cuda and cuda:N"), joined(device):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    with pytest.raises(UsageError, match=r"GPU [01] is wanted, this machine has none"), joined(device):
        pass


def test_a_broken_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE='two'"), joined("cpu"):
        pass
