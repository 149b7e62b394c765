import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import codegen.workspace
from codegen.checkpoint import RunKey
from codegen.events import RecordingEvents
from codegen.workspace import Workspace, check_output
from passes.errors import InputError, RankcError, UsageError, VerificationError

KEY = RunKey({"seed": 0}, {"model": "aa"}, {})
CHECKOUT = Path(codegen.workspace.__file__).parents[1]


def result(folder: Path, text: str) -> None:
    (folder / "model.onnx").write_text(text)
    (folder / "report.json").write_text(json.dumps({"schema": 1, "artifacts": {"onnx": "model.onnx", "x": "x/0"}}))
    (folder / "config.toml").write_text('dump_ir = "ir"\n')
    (folder / "ir").mkdir()


def finished(output: Path, text: str = "old") -> None:
    with Workspace(output, KEY) as space:
        result(space.staging, text)
        space.commit()


RESULT = {"out", "out/model.onnx", "out/report.json", "out/config.toml", "out/ir"}


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_commit_leaves_the_result_and_nothing_else(tmp_path: Path) -> None:
    finished(tmp_path / "deep" / "out")
    assert everything(tmp_path) == {"deep", *(f"deep/{path}" for path in RESULT)}


def test_the_output_appears_only_with_the_commit(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", KEY) as space:
        result(space.staging, "new")
        assert not (tmp_path / "out").exists()
        space.commit()
        assert (tmp_path / "out" / "model.onnx").read_text() == "new"


@pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "two renames"])
def test_force_replaces_the_whole_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool) -> None:
    if not atomic:
        monkeypatch.setattr(codegen.workspace.ctypes, "CDLL", lambda *args, **kwargs: object())
    finished(tmp_path / "out")
    (tmp_path / "out" / "layers.csv").write_text("stale")
    with Workspace(tmp_path / "out", KEY, force=True) as space:
        result(space.staging, "new")
        assert (tmp_path / "out" / "model.onnx").read_text() == "old"
        space.commit()
    assert everything(tmp_path) == RESULT
    assert (tmp_path / "out" / "model.onnx").read_text() == "new"


def test_a_failed_run_leaves_nothing_and_an_old_result_untouched(tmp_path: Path) -> None:
    for error in (InputError("x"), VerificationError("x")):
        with pytest.raises(type(error)), Workspace(tmp_path / "deep" / "out", KEY) as space:
            result(space.staging, "half")
            space.checkpoint("s", {}, {})
            raise error
        assert everything(tmp_path) == set()
    finished(tmp_path / "out")
    with pytest.raises(InputError), Workspace(tmp_path / "out", KEY, force=True) as space:
        result(space.staging, "half")
        raise InputError("x")
    assert everything(tmp_path) == RESULT
    assert (tmp_path / "out" / "model.onnx").read_text() == "old"


@pytest.mark.parametrize(("error", "kept"), [(RankcError, True), (InputError, True), (UsageError, False)])
def test_once_training_has_begun_its_state_outlives_an_error(
    tmp_path: Path, error: type[RankcError], kept: bool
) -> None:
    with pytest.raises(error), Workspace(tmp_path / "out", KEY) as space:
        space.checkpoint("s", {}, {"done": 1})
        (space.training_of("plan") / "training.pt").write_text("weights")
        raise error("x")
    assert (tmp_path / ".out.rankc").exists() == kept and not (tmp_path / "out").exists()
    if kept:
        with Workspace(tmp_path / "out", KEY, resume=True) as space:
            assert space.restore("s") is not None
            assert (space.training_of("plan") / "training.pt").read_text() == "weights"
            result(space.staging, "new")
            space.commit()
    assert not (tmp_path / ".out.rankc").exists()


CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from codegen.checkpoint import RunKey
from codegen.workspace import Workspace

output, moment = Path(sys.argv[1]), sys.argv[2]
with Workspace(output, RunKey({"seed": 0}, {"model": "aa"}, {}), force=output.exists()) as space:
    (space.staging / "model.onnx").write_text("half")
    if moment != "before a checkpoint":
        space.checkpoint("svd", {"u": np.arange(4)}, {"done": 1})
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("with_old_result", [False, True], ids=["fresh", "over an old result"])
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_no_result_and_can_go_on(
    tmp_path: Path, stop: signal.Signals, with_old_result: bool
) -> None:
    output = tmp_path / "out"
    if with_old_result:
        finished(output)
    interrupt(output, stop, "after a checkpoint")
    assert output.exists() == with_old_result
    if with_old_result:
        assert (output / "model.onnx").read_text() == "old"
    with Workspace(output, KEY, resume=True) as space:
        assert list(space.staging.iterdir()) == [], "nothing half-written is taken over"
        restored = space.restore("svd")
        assert restored is not None
        np.testing.assert_array_equal(restored[0]["u"], np.arange(4))
        assert restored[1] == {"done": 1}
        result(space.staging, "new")
        space.commit()
    assert everything(tmp_path) == RESULT
    assert (output / "model.onnx").read_text() == "new"


def test_an_interrupt_before_any_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", signal.SIGINT, "before a checkpoint")
    assert everything(tmp_path) == set()


def interrupt(output: Path, stop: signal.Signals, moment: str) -> None:
    command = [sys.executable, "-c", CHILD, str(output), moment]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(stop)
        assert child.wait(200) != 0


def test_a_run_killed_between_two_renames_is_put_right(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    (tmp_path / ".out.rankc").mkdir()
    (tmp_path / "out").rename(tmp_path / ".out.rankc" / "replaced")
    with pytest.raises(InputError), Workspace(tmp_path / "out", KEY):
        raise InputError("x")
    assert everything(tmp_path) == RESULT


def test_two_runs_on_one_output_are_refused(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", KEY) as first:
        result(first.staging, "first")
        with pytest.raises(UsageError) as caught, Workspace(tmp_path / "out", KEY):
            pass
        assert str(caught.value) == (
            f"{tmp_path}/out: another run is writing there; wait for it or choose another folder"
        )
        first.commit()
    assert (tmp_path / "out" / "model.onnx").read_text() == "first"


def test_another_run_s_state_survives_the_refusal(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", signal.SIGINT, "after a checkpoint")
    with pytest.raises(UsageError, match="the saved state belongs to another run"):
        Workspace(tmp_path / "out", RunKey({"seed": 1}, {"model": "aa"}, {}), resume=True).__enter__()
    with Workspace(tmp_path / "out", KEY, resume=True) as space:
        assert space.restore("svd") is not None


def test_a_damaged_checkpoint_is_reported_to_the_events(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", signal.SIGKILL, "after a checkpoint")
    data = next((tmp_path / ".out.rankc" / "state").glob("svd.*.npz"))
    data.write_bytes(data.read_bytes()[:40])
    events = RecordingEvents()
    with Workspace(tmp_path / "out", KEY, resume=True, events=events) as space:
        assert space.restore("svd") is None
    assert events.notes == [
        f"the checkpoint 'svd' is damaged (the digest of {data.name} does not fit): its stage runs again"
    ]


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    def line(output: Path, **options: bool) -> str:
        before = everything(tmp_path)
        with pytest.raises((UsageError, InputError)) as caught:
            check_output(output, **options)
        assert everything(tmp_path) == before
        return f"{caught.value.exit_code} {caught.value}".replace(str(tmp_path), "D")

    finished(tmp_path / "out")
    assert line(tmp_path / "out") == (
        "2 D/out: is not empty; --force replaces it, --resume goes on with an interrupted run"
    )
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    expected = "2 D/out: holds 'thesis.tex', which is no result of rankc; choose another folder"
    assert line(tmp_path / "out", force=True) == expected
    assert line(tmp_path / "out", resume=True) == expected
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model.onnx").write_text("mine")
    assert line(tmp_path / "home", force=True) == (
        "2 D/home: holds 'model.onnx', which is no result of rankc; choose another folder"
    )
    (tmp_path / "file").write_text("")
    assert line(tmp_path / "file") == "2 D/file: is a file, -o takes a folder"
    assert line(tmp_path / "file" / "out") == "4 D/file/out: cannot be created: D/file is no folder"
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")


def test_an_unwritable_folder_is_refused_up_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The answer is forced because the superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError) as caught:
        check_output(tmp_path / "a" / "out")
    assert str(caught.value) == f"{tmp_path}/a/out: cannot be created: {tmp_path} is not writable"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workspace(tmp_path / "out", KEY) as space:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError) as caught:
            space.checkpoint("s", {}, {})
        assert str(caught.value) == f"{tmp_path}/.out.rankc: cannot be written: No space left on device"


def test_what_is_to_end_up_in_the_output_is_written_to_the_staging_folder(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", KEY) as space:
        assert space.place(tmp_path / "out" / "ir" / "0.txt") == space.staging / "ir" / "0.txt"
        assert space.place(tmp_path / "ir") == tmp_path / "ir"
