"""What a person sees: progress on stderr while the run is on, tables on stdout at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from codegen.events import Progress as StageProgress
from codegen.report.html import METRICS
from codegen.report.numbers import change, duration, quantity, ratio
from codegen.report.recovery import score
from codegen.result import InspectRow

_FILE_WIDTH = 160
"""Columns where the output is no terminal: wide enough that tables in a log are not folded."""


class _Left(ProgressColumn):
    """Steps and the time left, where the number of steps is known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        return Text(f"{task.completed:.0f} of {task.total:.0f}{left}")


class _TaskProgress:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, n: int = 1, note: str = "") -> None:
        self._bars.advance(self._task, n)
        if note:
            self._bars.update(self._task, note=escape(note))


class ConsoleEvents:
    """Progress bars with the time left on a terminal, a line per finished stage anywhere else. A context manager.

    ``verbose`` shows notes as well; warnings are always shown. ``clock`` gives seconds.
    """

    def __init__(
        self, *, verbose: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._console = _console(stream or sys.stderr)
        self._verbose = verbose
        self._depth = 0
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._console,
            get_time=clock,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> ConsoleEvents:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[StageProgress]:
        task = self._bars.add_task("  " * self._depth + escape(name), total=total, note="")
        started = self._clock()
        self._depth += 1
        try:
            yield _TaskProgress(self._bars, task)
        finally:
            self._depth -= 1
            self._bars.remove_task(task)
        if self._depth == 0:
            self._console.print(f"[green]done[/]  {escape(name)}  [dim]{duration(self._clock() - started)}[/]")

    def note(self, text: str) -> None:
        if self._verbose:
            self._console.print(f"[dim]note[/]  {escape(text)}")

    def warning(self, text: str) -> None:
        self._console.print(f"[yellow]warning[/]  {escape(text)}")
        self._bars.refresh()


def print_report(report: dict[str, Any], *, explain: bool = False, stream: TextIO | None = None) -> None:
    """The layers and the summary on stdout; with ``explain`` each layer's reason and every note."""
    console = _console(stream or sys.stdout)
    layers = Table("layer", "op", "choice", "rank", box=None, pad_edge=False, header_style="bold")
    for column in ("before", "after", "ratio", "error"):
        layers.add_column(column, justify="right", no_wrap=True)
    if explain:
        layers.add_column("reason", overflow="fold")
    for layer in report["layers"]:
        row = [
            escape(layer["name"]),
            layer["op"],
            layer["choice"],
            "x".join(str(part) for part in layer["rank"] or ()),
            quantity(layer["latency_before"], layer["unit"]),
            quantity(layer["latency_after"], layer["unit"]),
            ratio(layer["latency_after"], layer["latency_before"]),
            "-" if layer["error"] is None else f"{layer['error']:.2g}",
        ]
        layers.add_row(*row, *([escape(layer["reason"])] if explain else []))
    console.print(layers)
    if explain:
        for note in report["notes"]:
            at = f"{note['node']} ({note['op']}): " if note["node"] else ""
            console.print(f"note  {escape(at + note['text'])}", highlight=False)
    console.print()
    console.print(_summary(report))
    if report["program"] is not None:
        _print_program(console, report["program"])
    if report["measurement"] is not None:
        _print_measurement(console, report["measurement"])
    if report["recovery"] is not None:
        _print_recovery(console, report["recovery"])
    error = report["output_error"]
    if error["relative_l2"] is not None:
        text = f"output error {error['relative_l2']:.3g} (relative L2, {error['samples']} samples, {error['data']})"
        console.print(escape(text), highlight=False)


def _print_program(console: Console, program: dict[str, Any]) -> None:
    latency, predicted = program["latency"], program["predicted_latency"]
    text = f"program {quantity(latency['value'], 'cycles')} on the engine"
    text += f" (price list {quantity(predicted['value'], 'cycles')}), {quantity(program['time_s'], 's')}"
    if program["baseline_latency"] is not None:
        before = program["baseline_latency"]["value"]
        text += f", {ratio(latency['value'], before)} of the {quantity(before, 'cycles')} of the network as it came"
    console.print(escape(text), highlight=False)
    parts = []
    if program["accuracy"] is not None:
        parts.append(f"accuracy in int8 {quantity(program['accuracy']['value'], 'top-1')}")
    if program["agreement"] is not None:
        found = program["agreement"]
        parts.append(
            f"{found['different']} of {found['compared']} output bytes differ from onnxruntime's integer kernels"
        )
    if not program["calibrated"]:
        parts.append("ranges from random inputs: cycles hold, values do not")
    if program["host"]:
        parts.append(f"on the host: {', '.join(call['name'] for call in program['host'])}")
    if parts:
        console.print(escape("  ".join(parts)), highlight=False)


def _print_measurement(console: Console, measured: dict[str, Any]) -> None:
    console.print()
    table = Table("timed in one process", box=None, pad_edge=False, header_style="bold")
    for column in ("latency", "of the input's", "interval", "calls"):
        table.add_column(column, justify="right", no_wrap=True)
    for contender in measured["contenders"]:
        interval = (
            "-" if contender["low"] is None else f"{100 * contender['low']:.1f} - {100 * contender['high']:.1f} %"
        )
        table.add_row(
            contender["name"],
            quantity(contender["seconds"], "s"),
            "-" if contender["ratio"] is None else f"{100 * contender['ratio']:.1f} %",
            interval,
            str(contender["calls"]),
        )
    console.print(table)
    threads = "1 thread" if measured["threads"] == 1 else f"{measured['threads']} threads"
    text = f"{threads}; predicted {quantity(measured['predicted_s'], 's')}; {measured['trials']} trials in this run"
    text += f", {measured['failed']} of them failed" if measured["failed"] else ""
    text += f", {measured['from_database']} of the binary's kernels needed none; {measured['database']}"
    console.print(escape(text), highlight=False)
    if measured["untuned"]:
        console.print(escape(f"never tuned: {'; '.join(measured['untuned'])}"), highlight=False)


def _print_recovery(console: Console, recovery: dict[str, Any]) -> None:
    before, after = (score(recovery[key], recovery["measure"]) for key in ("before", "after"))
    text = f"recovery {before} -> {after}" if recovery["best_epoch"] else f"recovery kept the start, {before}"
    if recovery["dense"] is not None:
        text += f", dense {score(recovery['dense'], recovery['measure'])}"
    text += f" on {recovery['held_out']} held-out samples; epoch {recovery['best_epoch']} of {recovery['epochs']}"
    text += f", {duration(recovery['seconds'])} on {recovery['device']} in {recovery['precision']}"
    console.print(escape(text), highlight=False)


def _summary(report: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("before", "after", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("source")
    table.add_column("budget")
    budgets = {budget["metric"]: budget for budget in report["budgets"]}
    for metric in METRICS:
        before, after = report["baseline"][metric], report["result"][metric]
        if after is None:
            continue
        table.add_row(
            metric,
            quantity(before["value"], before["unit"]) if before else "-",
            quantity(after["value"], after["unit"]),
            change(after["value"], before["value"] if before else None, after["unit"]),
            after["kind"],
            _verdict(budgets[metric]) if metric in budgets else "",
        )
    return table


def _verdict(budget: dict[str, Any]) -> str:
    limit = quantity(budget["limit"], budget["unit"])
    if budget["met"]:
        return f"[green]met[/] ({limit})"
    bound = "" if budget["bound"] is None else f", at best {quantity(budget['bound'], budget['unit'])}"
    return f"[red]missed[/] ({limit}{bound})"


def print_inspection(rows: Sequence[InspectRow], *, stream: TextIO | None = None) -> None:
    """Every node of a dry run with its status and reason."""
    table = Table("node", "op", "status", "reason", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(escape(row.node), row.op, row.status, escape(row.reason))
    _console(stream or sys.stdout).print(table)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process with exit code 1


def _console(stream: TextIO) -> Console:
    probe = _Console(file=stream)
    return probe if probe.is_terminal else _Console(file=stream, width=_FILE_WIDTH, highlight=False)
