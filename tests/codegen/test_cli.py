import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codegen import cli, cli_run
from codegen.config import LowerConfig
from codegen.events import Events
from codegen.result import InspectRow, LowerResult
from passes.errors import InputError, UnsupportedError, UsageError, VerificationError

CHECKOUT = Path(cli.__file__).resolve().parents[1]

QUANTITY = {"value": 10, "unit": "cycles", "kind": "simulated"}
NETWORK: dict[str, Any] = {
    "latency": QUANTITY,
    "energy": None,
    "macs": {"value": 3, "unit": "MACs", "kind": "measured"},
    "params": {"value": 3, "unit": "params", "kind": "measured"},
    "size": {"value": 3, "unit": "B", "kind": "measured"},
    "accuracy": None,
}
BUDGET = {
    "metric": "latency",
    "asked": "60%",
    "limit": 6,
    "unit": "cycles",
    "value": 10,
    "met": False,
    "kind": "simulated",
    "bound": 7,
}
REPORT = {
    "baseline": NETWORK,
    "result": NETWORK,
    "budgets": [BUDGET],
    "layers": [],
    "notes": [],
    "output_error": {"relative_l2": None, "limit": None, "data": "", "samples": 0},
    "program": None,
    "measurement": None,
    "recovery": None,
}

Lower = Callable[[LowerConfig, Events], LowerResult]


@pytest.fixture(autouse=True)
def _warnings_as_a_user_has_them(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        yield


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lower], list[LowerConfig]]:
    """Puts ``lower`` in the driver's place; returns the list of configurations it is called with."""

    def install(lower: Lower) -> list[LowerConfig]:
        seen: list[LowerConfig] = []

        def recorded(config: LowerConfig, events: Events) -> LowerResult:
            seen.append(config)
            return lower(config, events)

        def inspect(config: LowerConfig, events: Events) -> list[InspectRow]:
            seen.append(config)
            return [InspectRow("conv", "Conv", "rewritable", "svd")]

        monkeypatch.setattr(cli_run, "_driver", lambda: SimpleNamespace(lower=recorded, inspect=inspect))
        return seen

    return install


def succeed(config: LowerConfig, events: Events) -> LowerResult:
    with events.stage("solve", 1) as progress:
        progress.advance()
    events.note("a note")
    events.warning("a warning")
    os.write(1, b"stray line of a native library\n")
    print("stray line of Python")
    warnings.warn("a library's warning", stacklevel=1)
    return LowerResult(REPORT, False, config.output)


def fail(error: BaseException) -> Lower:
    def lower(config: LowerConfig, events: Events) -> LowerResult:
        raise error

    return lower


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["lower", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_every_option_arrives(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = driver(succeed)
    arguments = (
        "net.onnx --target asic:rows=32 --latency 60% --energy 1mJ --macs 40M --params 50% --size 1MiB --max-error 0.1 "
        "--calib c.npz --eval e.py:f --include a* --include b --exclude c --formats svd,tucker2 --plan p.json "
        "--solver s --effort quick --time-budget 1h30m --seed 3 --samples 7 --shape x:0=1,2 --shape s= --margin 0.1 "
        "-o out --force --dump-ir ir --explain -q"
    )
    assert call(*arguments.split()) == 0
    assert seen == [
        LowerConfig(
            model=tmp_path / "net.onnx",
            target="asic:rows=32",
            budgets={"latency": "60%", "energy": "1mJ", "macs": "40M", "params": "50%", "size": "1MiB"},
            max_error=0.1,
            calib=str(tmp_path / "c.npz"),
            eval=f"{tmp_path}/e.py:f",
            include=("a*", "b"),
            exclude=("c",),
            formats=("svd", "tucker2"),
            plan=tmp_path / "p.json",
            solver="s",
            effort="quick",
            time_budget_s=5400,
            seed=3,
            samples=7,
            shapes={"x:0": (1, 2), "s": ()},
            margin=0.1,
            output=tmp_path / "out",
            force=True,
            dump_ir=tmp_path / "ir",
            explain=True,
        )
    ]


def test_defaults_are_the_configuration_s(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = driver(succeed)
    assert call("net.onnx", "-o", "out", "-q") == 0
    assert call("net.onnx", "-o", "out", "-q", "--samples", "all") == 0
    default = LowerConfig(model=tmp_path / "net.onnx", output=tmp_path / "out")
    assert seen == [default, default.model_copy(update={"samples": None})]


@pytest.mark.parametrize("how", [["--config", "old/config.toml"], ["old/config.toml"]])
def test_a_configuration_runs_again_and_options_win(
    driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = driver(succeed)
    old = LowerConfig(model=tmp_path / "net.onnx", budgets={"latency": "60%"}, seed=5, output=tmp_path / "old")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.toml").write_text(old.to_toml(tmp_path / "old"))
    assert call(*how, "-q") == 0
    assert call(*how, "-q", "-o", "new", "--seed", "6", "--samples", "all") == 0
    assert seen == [old, old.model_copy(update={"output": tmp_path / "new", "seed": 6, "samples": None})]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "nothing to lower: give a network (.onnx, .pt2) or --config config.toml"),
        ("n.onnx", "no output folder: give -o DIR"),
        ("n.onnx -o o --latncy 60%", "No such option: --latncy"),
        ("n.onnx -o o --latency", "Option '--latency' requires an argument"),
        ("n.onnx m.onnx -o o", "unexpected extra argument"),
        ("n.onnx -o o --seed x", "Invalid value for '--seed'"),
        ("n.onnx -o o --latency 60", "--latency '60' has no unit; write 60%, 2.5ms, 300us or 120000cycles"),
        ("n.onnx -o o --effort max", "--effort 'max': input should be 'quick', 'default' or 'extensive'"),
        ("n.onnx -o o --max-error -1", "--max-error '-1.0': input should be greater than 0"),
        ("n.onnx -o o --samples some", "--samples 'some': input should be a valid integer"),
        ("n.onnx -o o --time-budget 10", "--time-budget '10' is no duration; write 90s, 10m or 1h30m"),
        ("n.onnx -o o --time-budget 0s", "--time-budget '0s' is no duration; write 90s, 10m or 1h30m"),
        ("n.onnx -o o --shape x=1,a", "--shape 'x=1,a': write INPUT=1,3,224,224 with sizes above zero"),
        ("n.onnx -o o --shape 1,3", "--shape '1,3': write INPUT=1,3,224,224 with sizes above zero"),
        ("n.onnx -o o --shape x=0", "--shape 'x=0': write INPUT=1,3,224,224 with sizes above zero"),
        ("n.onnx -o o --shape x=1 --shape x=2", "--shape x is given twice"),
        ("n.onnx -o o --force --resume", "--force starts over and --resume goes on: give one of them"),
        ("n.onnx -o o -q -v", "--verbose and --quiet contradict each other"),
        ("n.onnx -o o --json=", "--json takes a file, or - for stdout"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_2(driver: Any, capfd: Any, arguments: str, line: str) -> None:
    assert driver(succeed) == []
    assert call(*arguments.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("error: ") and line.lower() in err.lower(), err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("u"), 2, "error: u"),
        (InputError("i\nj"), 4, "error: i j"),
        (UnsupportedError("s"), 4, "error: s"),
        (VerificationError("v"), 5, "error: v"),
        (TypeError("t"), 1, "error: this is a fault in rankc: TypeError: t (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    driver: Any, capfd: Any, tmp_path: Path, error: BaseException, code: int, line: str
) -> None:
    driver(fail(error))
    arguments = ("n.onnx", "-o", str(tmp_path / "o"), "-q")
    assert call(*arguments) == code
    assert capfd.readouterr() == ("", line + "\n")
    assert call(*arguments, "--debug") == code
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", "Traceback (most recent call last):")
    assert err.splitlines()[-1] == line.replace(" (--debug shows where)", "")


def test_a_missed_budget_is_exit_3_with_the_bound(driver: Any, capfd: Any, tmp_path: Path) -> None:
    driver(lambda config, events: LowerResult(REPORT, True, config.output))
    assert call("n.onnx", "-o", str(tmp_path / "o")) == 3
    out, err = capfd.readouterr()
    assert "missed (6 cycles, at best 7 cycles)" in out
    assert err == "missed: latency is 10 cycles, the budget 6 cycles, no plan reaches less than 7 cycles\n"


def test_results_go_to_stdout_and_everything_else_to_stderr(driver: Any, capfd: Any, tmp_path: Path) -> None:
    driver(succeed)
    assert call("n.onnx", "-o", str(tmp_path / "o")) == 0
    out, err = capfd.readouterr()
    assert "stray" not in out and out.endswith(f"written to {tmp_path}/o\n")
    assert "stray line of a native library" in err and "stray line of Python" in err
    assert "done  solve" in err and "warning  a warning" in err and "a note" not in err
    assert "a library's warning" not in err
    call("n.onnx", "-o", str(tmp_path / "o"), "-v")
    assert "note  a note" in capfd.readouterr().err


def test_quiet_is_silent(driver: Any, capfd: Any, tmp_path: Path) -> None:
    driver(succeed)
    assert call("n.onnx", "-o", str(tmp_path / "o"), "-q") == 0
    assert capfd.readouterr() == ("", "")


def test_json_stands_alone_on_stdout_or_in_a_file(driver: Any, capfd: Any, tmp_path: Path) -> None:
    driver(succeed)
    assert call("n.onnx", "-o", str(tmp_path / "o"), "--json", "-") == 0
    assert json.loads(capfd.readouterr().out) == REPORT
    assert call("n.onnx", "-o", str(tmp_path / "o"), "--json", str(tmp_path / "r.json")) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == REPORT
    capfd.readouterr()
    assert call("n.onnx", "-o", str(tmp_path / "o"), "-q", "--json", str(tmp_path / "no" / "r.json")) == 2
    assert capfd.readouterr().err == (
        f"error: --json {tmp_path}/no/r.json: give a file in a folder that exists, or - for stdout\n"
    )


def test_a_dry_run_lists_nodes_and_needs_no_output(driver: Any, capfd: Any) -> None:
    seen = driver(fail(AssertionError("lower was called")))
    assert call("n.onnx", "--dry-run") == 0
    assert capfd.readouterr().out.split() == ["node", "op", "status", "reason", "conv", "Conv", "rewritable", "svd"]
    assert call("n.onnx", "--dry-run", "--json", "-") == 0
    nodes = [{"node": "conv", "op": "Conv", "status": "rewritable", "reason": "svd"}]
    assert json.loads(capfd.readouterr().out) == {"nodes": nodes}
    assert [config.dry_run for config in seen] == [True, True]


CHILD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from codegen import cli, cli_run
from codegen.checkpoint import RunKey
from codegen.workspace import Workspace

def lower(config, events):
    with Workspace(config.output, RunKey({}, {}, {}), resume=config.resume) as space:
        if config.resume:
            print("resumed", space.restore("svd")[1], file=sys.stderr)
            raise SystemExit(0)
        space.checkpoint("svd", {}, {"done": 1})
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)

cli_run._driver = lambda: SimpleNamespace(lower=lower)
cli.main()
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_exit_130_and_the_state_is_kept(tmp_path: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-c", CHILD, "lower", "n.onnx", "-q", "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        child.send_signal(stop)
        out, err = child.communicate(timeout=200)
    assert (child.returncode, out) == (130, "")
    assert err == "interrupted: the state is saved, --resume goes on from it\n"
    assert not (tmp_path / "out").exists()
    again = subprocess.run(
        [*command, "--resume"], cwd=CHECKOUT, capture_output=True, text=True, timeout=200, check=False
    )
    assert again.stderr == "resumed {'done': 1}\n"


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    code = (
        "from codegen import cli, cli_run\nfrom types import SimpleNamespace\nfrom codegen.result import InspectRow\n"
        "rows = [InspectRow('n' * 100, 'Conv', 'kept', 'r')] * 5000\n"
        "cli_run._driver = lambda: SimpleNamespace(inspect=lambda c, e: rows)\ncli.main()\n"
    )
    command = [sys.executable, "-c", code, "lower", "n.onnx", "--dry-run"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline().split() == ["node", "op", "status", "reason"]
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(200) == 0


def test_a_package_from_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "accel_sim").mkdir()
    (tmp_path / "accel_sim" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import accel_sim; sys.path[:0] = [{str(CHECKOUT)!r}]; "
    code += "from codegen.cli import main; main(['lower', 'n.onnx'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: accel_sim was imported from {tmp_path}/accel_sim, expected {CHECKOUT}/accel_sim; "
        "take it off PYTHONPATH\n"
    )
