"""The command ``rankc reproduce NAME``: an experiment of the tables re-run whole; a table or one JSON object out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from codegen.cli_options import Debug, Json, Quiet, json_target, not_both
from codegen.cli_streams import DONE, check_json_target, events, guarded, own_stdout, present
from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.reproduce.experiment import ScheduleName

Option = typer.Option


def reproduce(
    name: Annotated[str | None, typer.Argument(help="The experiment; --list shows which there are.")] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder of all experiments' results and checkpoints.")
    ] = None,
    data: Annotated[Path | None, Option(help="Folder of the data. [../shared/data beside the checkout]")] = None,
    models: Annotated[
        Path | None, Option(help="Folder of the networks. [../shared/models beside the checkout]")
    ] = None,
    schedule: Annotated[
        str, Option(help="short: what two cores do in about an hour; full: what a GPU is for.")
    ] = "short",
    seeds: Annotated[str | None, Option(help="Repetitions: 0,1,2. [0 where it is short, else 0,1,2]")] = None,
    epochs: Annotated[int | None, Option(min=1, help="Epochs of every step, in place of its recipe's.")] = None,
    dense: Annotated[Path | None, Option(help="Start from this dense network (.onnx) instead of training one.")] = None,
    device: Annotated[str, Option(help="Where training runs: auto, cpu, cuda or cuda:N.")] = "auto",
    list_: Annotated[bool, Option("--list", help="Show the experiments, and do nothing else.")] = False,
    json_: Json = None,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Show notes as well: a line for each epoch.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Re-run an experiment of the tables: train, lower, recover, evaluate. Called again, it goes on where it was."""
    not_both(verbose, quiet)

    def action() -> int:
        json_to = json_target(json_)
        check_json_target(json_to)
        if list_:
            if name is not None:
                raise UsageError("--list does nothing else: leave the experiment's name out")
            listing = [_listed(each) for each in _names()]
            with own_stdout(quiet) as stdout:
                present(_text({"experiments": listing}), lambda s: _show_list(listing, s), stdout, json_to, quiet=quiet)
            return DONE
        if name is None:
            raise UsageError(f"which experiment? There are: {', '.join(_names())}")
        if output is None:
            raise UsageError("no output folder: give -o DIR")
        with own_stdout(quiet) as stdout:
            with events(verbose, quiet) as watcher:
                from codegen.bench.benchmark import DATA, MODELS
                from codegen.reproduce.run import ReproduceConfig
                from codegen.reproduce.run import reproduce as carry_out

                config = ReproduceConfig(
                    name, output, data or DATA, models or MODELS, _schedule(schedule), _seeds(seeds), epochs, dense,
                    device,
                )  # fmt: skip
                result = carry_out(config, watcher)
            present(_text(result), lambda stream: _show(result, stream), stdout, json_to, quiet=quiet)
        return DONE

    kept = f"what is done is kept in {output}; the same command goes on with it"
    raise typer.Exit(guarded(action, lambda: kept, debug=debug))


def _names() -> tuple[str, ...]:
    from codegen.reproduce.experiment import names

    return names()


def _listed(name: str) -> dict[str, Any]:
    from codegen.reproduce.experiment import read

    config = read(name)
    return {"name": name, "title": config.title, "steps": [step.name for step in config.steps]}


def _schedule(text: str) -> ScheduleName:
    from codegen.reproduce.experiment import SCHEDULES

    for known in SCHEDULES:
        if text == known:
            return known
    raise UsageError(f"--schedule {text!r}: there are: {', '.join(SCHEDULES)}")


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"--seeds {text!r}: write whole numbers, such as 0,1,2")
    return tuple(int(part) for part in parts)


def _text(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _show_list(listing: list[dict[str, Any]], stream: TextIO) -> None:
    for row in listing:
        stream.write(f"{row['name']:22} {row['title']}\n")


def _show(result: Mapping[str, Any], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=stream, width=None if stream.isatty() else 160, highlight=False)
    shown = Table(box=box.MARKDOWN)
    for index, column in enumerate(("step", "top-1", "over dense", "int8", "MACs", "parameters", "latency", "budgets")):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in result["summary"]:
        ratios = (row[f"{metric}_ratio_mean"] for metric in ("macs", "params", "latency"))
        shown.add_row(
            escape(row["step"]),
            _spread(100 * row["accuracy_mean"], row["accuracy_deviation"], 100, "{:.2f} %"),
            _spread(row["gain_points_mean"], row["gain_points_deviation"], 1, "{:+.2f}"),
            _spread(100 * row["accuracy_int8_mean"], row["accuracy_int8_deviation"], 100, "{:.2f} %")
            if row["accuracy_int8_mean"] is not None
            else "-",
            *("-" if ratio is None else f"{100 * ratio:.1f} %" for ratio in ratios),
            _budgets(row["budgets_missed"], row["runs"]),
        )
    for row in result["published"]:
        macs = row.get("macs_removed")
        shown.add_row(
            escape(f"{row['system']} (published)"),
            f"{row['accuracy']:.2f} %" if "accuracy" in row else "-",
            f"{row['gain_points']:+.2f}" if "gain_points" in row else "-",
            "-",
            "-" if macs is None else f"{100 - macs:.1f} %",
            "-",
            "-",
            "-",
        )
    seeds = ", ".join(map(str, result["seeds"]))
    console.print(escape(f"{result['title']}; schedule {result['schedule']}, seeds {seeds}"))
    console.print(shown)


def _budgets(missed: int | None, runs: int) -> str:
    if missed is None:
        return "-"
    return "met" if not missed else "missed" if runs == 1 else f"missed by {missed} of {runs}"


def _spread(mean: float, deviation: float | None, scale: float, form: str) -> str:
    text = form.format(mean)
    return text if deviation is None else f"{text} ± {scale * deviation:.2f}"
