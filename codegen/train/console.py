"""What a person sees of a training run: a line per epoch while it is on, layers and totals at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codegen.report.console import ConsoleEvents
from codegen.report.numbers import duration, quantity, ratio
from passes.training.progress import Epoch

_FILE_WIDTH = 160


class TrainingConsole(ConsoleEvents):
    """:class:`ConsoleEvents` that also says how each epoch ended."""

    def epoch(self, phase: str, epoch: Epoch, epochs: int) -> None:
        held = "" if epoch.held_out is None else f", held out {_score(epoch.held_out)}"
        text = f"{phase} {epoch.number + 1}/{epochs}: loss {epoch.loss:.4f}{held}, {duration(epoch.seconds)}"
        self._console.print(escape(text), highlight=False)


def print_training(report: Mapping[str, Any], stream: TextIO) -> None:
    """The layers, the phases and the totals on ``stream``."""
    console = Console(file=stream, width=None if stream.isatty() else _FILE_WIDTH, highlight=False)
    low = [row for row in report["layers"] if row["choice"] != "dense"]
    if low:
        table = _table("layer", "choice", "rank", "before", "after", "ratio")
        for row in low:
            rank = "x".join(str(r) for r in row["rank"])
            before, after = row["macs_before"], row["macs_after"]
            counts = [quantity(count, "MACs") for count in (before, after)]
            table.add_row(escape(row["name"]), row["choice"], rank, *counts, ratio(after, before))
        console.print(table)
        console.print()
    table = _table("phase", "epochs", "best", "held out", "time")
    for row in report["phases"]:
        held = "-" if row["held_out"] is None else _score(row["held_out"])
        table.add_row(row["name"], str(len(row["epochs"])), str(row["best"]), held, duration(row["seconds"]))
    console.print(table)
    console.print()
    before, after = report["baseline"], report["result"]
    for key, unit in (("macs", "MACs"), ("params", "params")):
        text = f"{quantity(after[key], unit)}, {ratio(after[key], before[key])} of the dense network's"
        console.print(f"{text} {quantity(before[key], unit)}")
    if after["accuracy"] is not None:
        samples = report["data"]["eval"]["samples"]
        console.print(f"top-1 {quantity(after['accuracy'], 'top-1')} on {samples:,} samples, by onnxruntime")


def _score(value: float) -> str:
    """An accuracy; minus a loss where there are no labels."""
    return f"{100 * value:.2f} %" if value >= 0 else f"{value:.4g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index > 1 else "left", no_wrap=bool(index))
    return table
