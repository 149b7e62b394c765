"""What a person sees of a simulation: tables of totals, layers, stalls and a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codegen.report.numbers import quantity
from codegen.simulate.plots import caption
from codegen.simulate.report import QUEUES

_FILE_WIDTH = 160
_TOTALS = (
    ("latency", "latency"),
    ("time_per_image", "time per image"),
    ("images_per_second", "images a second"),
    ("cycles", "cycles, machine"),
    ("host_cycles", "cycles, host"),
    ("predicted_cycles", "cycles, price list"),
    ("energy", "energy"),
    ("dram_bytes", "DRAM bytes"),
    ("saved_dram_bytes", "saved by maps on chip"),
    ("macs", "MACs"),
    ("utilization", "array used"),
)


def print_simulation(report: Mapping[str, Any], stream: TextIO, *, stalls: bool = False) -> None:
    """Tables on ``stream``; with ``stalls`` also what each queue does in each layer."""
    console = Console(file=stream, width=None if stream.isatty() else _FILE_WIDTH, highlight=False)
    machines = report["machines"]
    if len(machines) == 1:
        _print_layers(console, machines[0])
    else:
        _print_side_by_side(console, machines)
    if stalls:
        for machine in machines:
            _print_stalls(console, machine)
    console.print()
    console.print(_totals(machines))
    for machine in machines:
        _print_remarks(console, machine, len(machines) > 1)
    if report["sweep"] is not None:
        console.print()
        _print_sweep(console, report["sweep"])
    if report["outputs"] is not None:
        found = report["outputs"]
        for tensor in found["tensors"]:
            size = "x".join(map(str, tensor["shape"]))
            words = f"output {tensor['name']} ({size}, {found['samples']} samples): SHA-256 {tensor['sha256'][:16]}…"
            console.print(escape(words))
    if report["model"]["ranges"].startswith("random"):
        console.print(f"ranges from {report['model']['ranges']}: cycles hold, values do not (--calib gives real ones)")


def _table(*columns: str) -> Table:
    """The first column left, the others right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=bool(index))
    return table


def _print_layers(console: Console, machine: Mapping[str, Any]) -> None:
    engine = machine["source"] == "engine"
    waits = ("execute waits",) if engine else ()
    predicted = ("price list",) if engine else ()
    columns = ("cycles", *predicted, "array used", *waits, "DRAM", "energy", "MACs/B", "reached", "attainable", "limit")
    table = _table("layer", "unit", *columns)
    table.columns[1].justify = "left"
    for layer in machine["layers"]:
        at = layer["roofline"]
        cells = [f"{layer['cycles']:,}"]
        if engine:
            cells.append("-" if layer["predicted_cycles"] is None else f"{layer['predicted_cycles']:,}")
        cells.append(f"{100 * layer['utilization']:.1f} %")
        if engine:
            cells.append(_waits(layer))
        cells += [quantity(layer["dram_bytes"], "B"), quantity(layer["energy_pj"], "pJ")]
        cells += [_number(at[key]) for key in (
            "intensity_macs_per_byte", "reached_macs_per_cycle", "attainable_macs_per_cycle"
        )]  # fmt: skip
        table.add_row(escape(layer["name"]), layer["unit"], *cells, at["side"])
    console.print(table)


def _waits(layer: Mapping[str, Any]) -> str:
    """The reason for which the execute queue waits longest, with its share of the layer's cycles."""
    reasons = {reason: n for reason, n in layer["stalls"].get("execute", {}).items() if reason != "busy"}
    if not reasons or not layer["cycles"]:
        return "-"
    reason = max(reasons, key=lambda name: reasons[name])
    return f"{reason} {100 * reasons[reason] / layer['cycles']:.0f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _print_side_by_side(console: Console, machines: list[Mapping[str, Any]]) -> None:
    """Cycles per layer and machine; layers that one machine does not have stay empty."""
    table = _table("cycles of layer", *(escape(machine["target"]["name"]) for machine in machines))
    cycles: dict[str, list[str]] = {}
    for place, machine in enumerate(machines):
        for layer in machine["layers"]:
            row = cycles.setdefault(layer["name"], ["-"] * len(machines))
            row[place] = f"{layer['cycles']:,}"
    for name, row in cycles.items():
        table.add_row(escape(name), *row)
    console.print(table)


def _print_stalls(console: Console, machine: Mapping[str, Any]) -> None:
    if not machine["stalls"]:
        return
    console.print()
    table = _table(f"cycles by queue, {escape(machine['target']['name'])}", "cycles", *QUEUES)
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "left", False
    rows = [*machine["layers"], {"name": "in all", "cycles": sum(layer["cycles"] for layer in machine["layers"]), **{
        "stalls": machine["stalls"]
    }}]  # fmt: skip
    for layer in rows:
        cells = [
            ", ".join(f"{reason} {count:,}" for reason, count in layer["stalls"].get(queue, {}).items())
            for queue in QUEUES
        ]
        table.add_row(escape(layer["name"]), f"{layer['cycles']:,}", *cells)
    console.print(table)


def _totals(machines: list[Mapping[str, Any]]) -> Table:
    names = [escape(machine["target"]["name"]) for machine in machines]
    table = _table("", *names, "source")
    table.columns[-1].justify = "left"
    for key, name in _TOTALS:
        found = [machine["totals"][key] for machine in machines]
        if all(entry is None or (not entry["value"] and key in ("host_cycles", "saved_dram_bytes")) for entry in found):
            continue
        kinds = list(dict.fromkeys(entry["kind"] for entry in found if entry is not None))
        table.add_row(name, *(_total(key, entry) for entry in found), " and ".join(kinds))
    return table


def _total(key: str, entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    if key == "utilization":
        return f"{100 * entry['value']:.1f} %"
    if key == "images_per_second":
        return f"{entry['value']:,.0f}" if entry["value"] >= 100 else f"{entry['value']:.3g}"
    if entry["value"] < 0:
        return f"-{quantity(-entry['value'], entry['unit'])}"
    return quantity(entry["value"], entry["unit"])


def _print_remarks(console: Console, machine: Mapping[str, Any], named: bool) -> None:
    lead = f"{machine['target']['name']}: " if named else ""
    remarks = []
    if machine["source"] == "price list":
        remarks.append(f"simulated by the price list: {machine['reason']}")
    for part in machine["host"]:
        cycles = quantity(part["cycles"], "cycles")
        remarks.append(f"on the host: {part['name']} ({part['op']}), {part['reason']}; {cycles} (estimated)")
    for change in machine["layout_changes"]:
        moved = quantity(change["dram_bytes"], "B")
        remarks.append(f"layout change: {change['tensor']}, {change['cycles']:,} cycles, {moved}")
    for remark in [*remarks, *machine["notes"]]:
        console.print(escape(lead + remark), soft_wrap=True)


def _print_sweep(console: Console, sweep: Mapping[str, Any]) -> None:
    names = ["+".join(axis["keys"]) for axis in sweep["axes"]]
    table = _table(names[0], *names[1:], "latency", "time", "array used", "energy", "DRAM", "source")
    for point in sweep["points"]:
        changed = [escape(point["changes"][axis["keys"][0]]) for axis in sweep["axes"]]
        totals = point["totals"]
        if totals is None:
            table.add_row(*changed, "-", "-", "-", "-", "-", "none fits")
            continue
        table.add_row(
            *changed,
            quantity(totals["latency"]["value"], "cycles"),
            quantity(totals["time"]["value"], "s"),
            f"{100 * totals['utilization']['value']:.1f} %",
            quantity(totals["energy"]["value"], "pJ"),
            quantity(totals["dram_bytes"]["value"], "B"),
            point["source"],
        )
    console.print(table)
    console.print(escape(f"{caption(sweep)} (simulated)"))
