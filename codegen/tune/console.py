"""What a person sees of tuning: a row per kernel, the sum over the layers, and what is in a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codegen.report.numbers import quantity, ratio

_FILE_WIDTH = 160


def print_tuning(report: Mapping[str, Any], stream: TextIO) -> None:
    """The kernels of a run on ``stream``, and what they add up to."""
    console = _console(stream)
    totals, found = report["totals"], report["database"]
    if report["workloads"]:
        table = _table("kernel", "layers", "default", "best", "ratio", "GFLOP/s", "trials", "broken")
        for row in report["workloads"]:
            table.add_row(
                escape(row["workload"]),
                str(row["layers"]),
                quantity(row["default_s"], "s"),
                quantity(row["best_s"], "s"),
                ratio(row["best_s"], row["default_s"]),
                _giga(row["flops_per_s"]),
                str(row["trials"]),
                str(row["broken"] or ""),
            )
        console.print(table)
        console.print()
        text = f"all layers one after another: {quantity(totals['default_s'], 's')} by default, "
        text += f"{quantity(totals['best_s'], 's')} by the best schedules (measured, minimum of single calls)"
        console.print(text)
    for row in report["without_template"]:
        console.print(escape(f"no template: {row['workload']}, {_many(row['layers'], 'layer')}"), soft_wrap=True)
    for row in report["workloads"]:
        if row["best_s"] is None and row["trials"]:
            console.print(escape(f"every trial broke: {row['workload']}: {row['error']}"), soft_wrap=True)
    if report["models"]:
        broken = f", {totals['broken']} of them broken" if totals["broken"] else ""
        console.print(f"{_many(totals['measured'], 'trial')} made, {totals['trials']} known of these kernels{broken}")
    changes = "".join(f", {found[key]} {key}" for key in ("merged", "dropped") if found[key])
    console.print(escape(f"{found['path']}: {_many(found['schedules'], 'schedule')}{changes}"), soft_wrap=True)


def print_listing(rows: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """A database's kernels by device and versions."""
    console = _console(stream)
    for (device, versions), group in groupby(rows, key=lambda row: (row["device"], row["versions"])):
        console.print(escape(f"{device} ({versions})"), soft_wrap=True)
        table = _table("kernel", "best", "GFLOP/s", "trials", "broken", "schedule")
        table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
        for row in group:
            table.add_row(
                escape(row["workload"]),
                quantity(row["best_s"], "s"),
                _giga(row["flops_per_s"]),
                str(row["trials"]),
                str(row["broken"] or ""),
                escape(_schedule(row["schedule"])),
            )
        console.print(table)
        console.print()
    if not rows:
        console.print("the database is empty")


def _schedule(schedule: Mapping[str, Any] | None) -> str:
    if schedule is None:
        return "-"
    params = (f"{name}={value}" for name, value in schedule["params"].items() if len(str(value)) <= 20)
    return " ".join((schedule["template"], *params))


def _giga(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:.1f}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=bool(index))
    return table


def _console(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else _FILE_WIDTH, highlight=False)
