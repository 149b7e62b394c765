"""The command ``rankc bench NAME``: options in, tables or one JSON object out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from codegen.bench import BUILTIN
from codegen.cli_options import Debug, Json, json_target
from codegen.cli_streams import DONE, check_json_target, events, guarded, own_stdout, present
from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.bench.benchmark import Table

Option = typer.Option


def bench(
    name: Annotated[str, typer.Argument(help=f"The benchmark: {', '.join(BUILTIN)}.")],
    models: Annotated[
        Path | None, Option(help="Folder of the networks. [../shared/models beside the checkout]")
    ] = None,
    data: Annotated[Path | None, Option(help="Folder of the data. [../shared/data beside the checkout]")] = None,
    rows: Annotated[str | None, Option(help="ptq-resnet20: which of its rows, such as ac. [abcd]")] = None,
    budgets: Annotated[
        str | None, Option(help="Latency budgets in percent: ptq-resnet20 [90,80,70,60,50], solvers-haloc [70,50].")
    ] = None,
    samples: Annotated[
        int | None, Option(min=2, help="solvers-haloc: training images for the search by gradient. [4000]")
    ] = None,
    limits: Annotated[
        str | None, Option(help="cpu-resnet20: budgets, a run of lower each. [latency=50%,macs=28%]")
    ] = None,
    database: Annotated[
        Path | None, Option(help="cpu-*: file of trials that is read and added to. [one that is removed again]")
    ] = None,
    target: Annotated[str | None, Option(help="Target whose latency counts. [asic]")] = None,
    effort: Annotated[str | None, Option(help="quick, default or extensive. [default]")] = None,
    images: Annotated[int | None, Option(min=1, help="*-resnet20: test images to evaluate on. [all]")] = None,
    plans: Annotated[
        int | None, Option(min=3, help="error-models: how many plans of each family; cpu-prediction. [40]")
    ] = None,
    corrected: Annotated[
        int | None, Option(min=0, help="error-models: how many of them after sequential correction too. [20]")
    ] = None,
    networks: Annotated[
        str | None,
        Option(help="lower-time, flipped-bits: which networks. [resnet20,resnet50; digits,resnet20,host]"),
    ] = None,
    bits: Annotated[int | None, Option(min=1, help="flipped-bits: bits of each section. [200]")] = None,
    layers: Annotated[
        int | None,
        Option(
            min=1,
            help="asic-pricing, asic-engine: random layers [1000, 200]; asic-vs-scalesim: how many of its. [all]",
        ),
    ] = None,
    dataflow: Annotated[str | None, Option(help="asic-vs-scalesim: ws, os or is. [ws]")] = None,
    scalesim_python: Annotated[
        Path | None, Option(help="asic-vs-scalesim: a Python that has SCALE-Sim 3.0.0. [an environment in the cache]")
    ] = None,
    output: Annotated[Path | None, Option(help="staircase: draw it into this .svg or .png. [no picture]")] = None,
    reference: Annotated[Path | None, Option(help="validation: folder of SCALE-Sim's reports. [../shared/...]")] = None,
    repeats: Annotated[int | None, Option(min=1, help="asic-*: samples of each figure. [7]")] = None,
    seed: Annotated[int | None, Option(min=0, help="Seed of everything random. [0]")] = None,
    json_: Json = None,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Show no progress.")] = False,
    debug: Debug = False,
) -> None:
    """Run a benchmark: its tables on stdout, progress on stderr."""

    def action() -> int:
        from codegen.bench.benchmark import envelope, make

        given: dict[str, Any] = {
            "models": models, "data": data, "rows": rows, "target": target, "effort": effort, "images": images,
            "plans": plans, "corrected": corrected, "seed": seed, "layers": layers, "repeats": repeats,
            "dataflow": dataflow, "scalesim_python": scalesim_python, "output": output, "reference": reference,
            "bits": bits, "database": database, "samples": samples,
            "limits": None if limits is None else tuple(part.strip() for part in limits.split(",")),
            "budgets": None if budgets is None else percentages(budgets),
            "networks": None if networks is None else tuple(part.strip() for part in networks.split(",")),
        }  # fmt: skip
        benchmark = make(name, {option: value for option, value in given.items() if value is not None})
        json_to = json_target(json_)
        check_json_target(json_to)
        with own_stdout(quiet) as stdout:
            with events(False, quiet) as watcher:
                result = envelope(benchmark, benchmark.run(watcher))
            text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            present(text, lambda stream: _show(benchmark.tables(result), stream), stdout, json_to)
        return DONE

    nothing: Callable[[], str] = lambda: "nothing was written"  # noqa: E731
    raise typer.Exit(guarded(action, nothing, debug=debug))


def percentages(text: str) -> tuple[int, ...]:
    """``90,50`` as whole numbers of percent, in the order given."""
    parts = [part.strip().removesuffix("%") for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 100 for part in parts):
        raise UsageError(f"--budgets {text!r}: write percentages between 1 and 100, such as 80,60")
    return tuple(int(part) for part in parts)


def _show(tables: list[Table], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(file=stream, width=None if stream.isatty() else 160, highlight=False)
    for table in tables:
        shown = RichTable(box=box.MARKDOWN)
        for index, column in enumerate(table.columns):
            shown.add_column(escape(column), justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*(escape(cell) for cell in row))
        console.print(escape(table.title))
        console.print(shown)
