"""A process that is started before there is a request for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from codegen.child_process import Child, Failure

MODULE = """
import os
from pathlib import Path
from codegen.child_process import reply

def prepare():
    Path(os.environ["READY"]).write_text(str(os.getpid()))

def work(request):
    if request["value"] < 0:
        raise ValueError("below zero")
    if request["value"] == 0:
        raise KeyError("zero")
    return {"twice": 2 * request["value"], "input": os.read(0, 1).decode()}

reply(work, ValueError, prepare)
"""


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "doubling.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "ready"


def wait_for(path: Path) -> int:
    for _ in range(3000):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError("the process did not come up")


def test_a_child_prepares_before_it_is_asked(ready: Path) -> None:
    with Child("doubling", {"READY": str(ready)}) as child:
        pid = wait_for(ready)
        assert child.call({"value": 21}) == {"twice": 42, "input": ""}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_that_is_not_asked_ends_with_its_context(ready: Path) -> None:
    with pytest.raises(RuntimeError, match="no request"), Child("doubling", {"READY": str(ready)}) as child:
        pid = wait_for(ready)
        raise RuntimeError("no request")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with child:  # leaving again changes nothing
        pass


def test_refusals_are_answers_and_other_errors_failures(ready: Path) -> None:
    with Child("doubling", {"READY": str(ready)}) as child:
        assert child.call({"value": -1}) == {"reason": "below zero"}
    with Child("doubling", {"READY": str(ready)}) as child:
        failed = child.call({"value": 0})
    assert isinstance(failed, Failure)
    assert failed.reason == "failed: KeyError: 'zero'"
