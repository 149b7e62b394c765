"""One run as the command line sees it: streams, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from passes.errors import InputError, RankcError, UsageError

if TYPE_CHECKING:
    from codegen.config import LowerConfig
    from codegen.events import Events
    from codegen.result import LowerResult

DONE, OUR_FAULT, MISSED, INTERRUPTED = 0, 1, 3, 130
STDOUT = Path("-")


def run(
    model: Path | None,
    config_path: Path | None,
    values: Callable[[], dict[str, Any]],
    json_to: Path | None,
    *,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Carries out one ``lower`` and returns its exit code; errors are one line on stderr."""
    config: LowerConfig | None = None
    try:
        with _interruptible():
            config = _config(model, config_path, values())
            _check_json_target(json_to)
            if not (debug or sys.warnoptions):
                warnings.simplefilter("ignore")  # what libraries tell programmers is nothing for users
            with _own_stdout(quiet) as stdout:
                carry_out = _inspect if config.dry_run else _lower
                return carry_out(config, stdout, json_to, verbose, quiet)
    except RankcError as error:
        _say(f"error: {error}", debug)
        return error.exit_code
    except KeyboardInterrupt:
        _say(f"interrupted: {_what_next(config)}", debug)
        return INTERRUPTED
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        hint = "" if debug else " (--debug shows where)"
        _say(f"error: this is a fault in rankc: {type(error).__name__}: {first}{hint}", debug)
        return OUR_FAULT


def _config(model: Path | None, config_path: Path | None, values: dict[str, Any]) -> LowerConfig:
    from codegen.config import LowerConfig

    if model is not None and model.suffix == ".toml" and config_path is None:
        model, config_path = None, model
    if model is not None:
        values["model"] = model
    if config_path is None:
        if model is None:
            raise UsageError("nothing to lower: give a network (.onnx) or --config config.toml")
        config = LowerConfig.from_values(values, "command line").resolved(Path.cwd())
    else:
        # The model is a required option, so the values are checked and made absolute on a stand-in.
        partial = LowerConfig.from_values({"model": config_path, **values}, "command line").resolved(Path.cwd())
        config = LowerConfig.from_toml(config_path, {name: getattr(partial, name) for name in values})
    if config.output is None and not config.dry_run:
        raise UsageError("no output folder: give -o DIR")
    return config


def _lower(config: LowerConfig, stdout: TextIO, json_to: Path | None, verbose: bool, quiet: bool) -> int:
    from codegen.report.build import to_json
    from codegen.report.console import print_report

    driver = _driver()
    with _events(verbose, quiet) as events:
        result: LowerResult = driver.lower(config, events)
    with _closed_pipe_is_fine(stdout):
        if json_to == STDOUT:
            stdout.write(to_json(result.report))
        elif not quiet:
            print_report(result.report, explain=config.explain, stream=stdout)
            if result.output is not None:
                print(f"written to {result.output}", file=stdout)
    _write(json_to, to_json(result.report))
    if not result.missed:
        return DONE
    if not quiet:
        print(f"missed: {'; '.join(_missed(result.report))}", file=sys.stderr)
    return MISSED


def _inspect(config: LowerConfig, stdout: TextIO, json_to: Path | None, verbose: bool, quiet: bool) -> int:
    from codegen.report.console import print_inspection

    driver = _driver()
    with _events(verbose, quiet) as events:
        rows = driver.inspect(config, events)
    text = json.dumps({"nodes": [asdict(row) for row in rows]}, indent=2, ensure_ascii=False) + "\n"
    with _closed_pipe_is_fine(stdout):
        if json_to == STDOUT:
            stdout.write(text)
        elif not quiet:
            print_inspection(rows, stream=stdout)
    _write(json_to, text)
    return DONE


@contextmanager
def _events(verbose: bool, quiet: bool) -> Iterator[Events]:
    from codegen.events import QuietEvents
    from codegen.report.console import ConsoleEvents

    if quiet:
        yield QuietEvents()
    else:
        with ConsoleEvents(verbose=verbose) as events:
            yield events


def _check_json_target(json_to: Path | None) -> None:
    """A long run must not end in a report that has nowhere to go."""
    if json_to is not None and json_to != STDOUT and (json_to.is_dir() or not json_to.absolute().parent.is_dir()):
        raise UsageError(f"--json {json_to}: give a file in a folder that exists, or - for stdout")


def _write(json_to: Path | None, text: str) -> None:
    if json_to is None or json_to == STDOUT:
        return
    try:
        json_to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{json_to}: cannot be written: {error.strerror}") from error


def _missed(report: dict[str, Any]) -> Iterator[str]:
    from codegen.report.numbers import quantity

    for budget in report["budgets"]:
        if not budget["met"]:
            reached, limit = (quantity(budget[key], budget["unit"]) for key in ("value", "limit"))
            bound = budget["bound"]
            at_best = "" if bound is None else f", no plan reaches less than {quantity(bound, budget['unit'])}"
            yield f"{budget['metric']} is {reached}, the budget {limit}{at_best}"
    error = report["output_error"]
    if error["limit"] is not None and (error["relative_l2"] or 0) > error["limit"]:
        yield f"the output error is {error['relative_l2']:.3g}, the limit {error['limit']:.3g}"


def _driver() -> Any:
    """Imported on first use: it brings torch and onnxruntime, which take seconds."""
    import codegen.driver

    return codegen.driver


@contextmanager
def _own_stdout(quiet: bool) -> Iterator[TextIO]:
    """The real stdout as a stream; meanwhile descriptor 1 leads to stderr (with ``quiet``, nowhere).

    Native libraries print to descriptor 1 (HiGHS does), which must not end up between results.
    """
    sys.stdout.flush()
    real = os.dup(1)
    with open(os.devnull, "w") if quiet else os.fdopen(os.dup(2), "w") as elsewhere:
        os.dup2(elsewhere.fileno(), 1)
        try:
            with redirect_stdout(elsewhere), os.fdopen(os.dup(real), "w", encoding="utf-8") as stream:
                yield stream
        finally:
            os.dup2(real, 1)
            os.close(real)


@contextmanager
def _closed_pipe_is_fine(stream: TextIO) -> Iterator[None]:
    """``rankc lower ... | head`` is no error."""
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a run the way Ctrl-C does: with its state saved."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _what_next(config: LowerConfig | None) -> str:
    from codegen.workspace import can_resume

    if config is not None and config.output is not None and can_resume(config.output):
        return "the state is saved, --resume goes on from it"
    return "nothing was written"


def _say(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(" ".join(line.splitlines()), file=sys.stderr)
