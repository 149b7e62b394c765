"""Published figures of other machines and simulators beside ours: the tables of docs/validation.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accel_sim.spec_file import load_spec
from accel_sim.validation.eyeriss import NETWORKS, chip_rows, compare, mean_absolute_deviation
from accel_sim.validation.scalesim import overlap, read_reports, runs, total_excess, traffic
from accel_sim.validation.totals import compare_total, published_totals
from codegen.bench.benchmark import SCALESIM_REPORTS, Table
from codegen.events import Events

EYERISS = "eyeriss_12x14"
_OVERLAP_RUNS = (("s32_ws_calc", "Resnet18"), ("s32_os_calc", "Resnet18"))
_TRAFFIC_RUNS = (
    *(("s32_ws_calc", "Resnet18"), ("s32_os_calc", "Resnet18"), ("s32_is_calc", "Resnet18")),
    *(("eyeriss_ws_calc", "alexnet"), ("s32_ws_user", "alexnet")),
)


@dataclass(frozen=True)
class Validation:
    """``reference``: folder of SCALE-Sim's reports; where it is missing, so are the tables made from it."""

    reference: Path = SCALESIM_REPORTS

    name: ClassVar[str] = "validation"

    def run(self, events: Events) -> dict[str, Any]:
        """Eyeriss by layer, other machines' totals, SCALE-Sim's cycles and traffic."""
        with events.stage("Eyeriss", None):
            eyeriss = {}
            for network in NETWORKS:
                found = compare(chip_rows(network), load_spec(EYERISS))
                plain = compare(chip_rows(network), load_spec(EYERISS, {"pass_overhead_cycles": "0"}))
                eyeriss[network] = {
                    "mean_absolute_deviation": mean_absolute_deviation(found),
                    "mean_absolute_deviation_without_overhead": mean_absolute_deviation(plain),
                    "mappings": found[0].chip.mapping_source,
                    "rows": [
                        {
                            "layer": row.chip.name,
                            "mapping": list(row.chip.mapping),
                            "deviation": row.deviation,
                            "deviation_without_overhead": bare.deviation,
                            "chip": _figures(row.chip),
                            "ours": _figures(row),
                            "psum_mb": row.psum_mb,
                        }
                        for row, bare in zip(found, plain, strict=True)
                    ],
                }
        with events.stage("totals", None):
            totals = [
                {
                    "name": entry.published.name,
                    "source": entry.published.source,
                    "published_cycles": entry.published.cycles,
                    "cycles": entry.cycles,
                    "floor_cycles": entry.floor_cycles,
                    "factor": entry.factor,
                }
                for entry in map(compare_total, published_totals())
            ]
        result: dict[str, Any] = {"eyeriss": eyeriss, "totals": totals, "scalesim": None}
        path = self.reference / "ALL_LAYERS.csv"
        if path.is_file():
            with events.stage("SCALE-Sim", None):
                result["scalesim"] = _scalesim(path)
        else:
            events.note(
                f"{path} is missing: no comparison with SCALE-Sim's reports; give their folder with --reference"
            )
        return {**result, "kinds": {"cycles": "simulated", "chip": "published"}}

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        tables = [_eyeriss_table(network, found) for network, found in result["eyeriss"].items()]
        tables += [_traffic_table(network, found) for network, found in result["eyeriss"].items()]
        totals = tuple(
            (
                *(row["name"], f"{row['published_cycles']:,}", f"{row['cycles']:,}", f"{row['floor_cycles']:,}"),
                f"{row['factor']:.2f}",
            )
            for row in result["totals"]
        )
        columns = ("network on a machine of its size", "published cycles", "ours", "our roofline", "published / ours")
        tables.append(Table("Totals of other machines", columns, totals))
        if result["scalesim"] is not None:
            tables += _scalesim_tables(result["scalesim"])
        return tables


def _figures(row: Any) -> dict[str, float]:
    names = ("processing_ms", "active_elements", "global_buffer_mb", "dram_mb", "power_mw")
    return {name: getattr(row, name) for name in names}


def _scalesim(path: Path) -> dict[str, Any]:
    found = runs(read_reports(path))
    overlaps = {}
    for run in _OVERLAP_RUNS:
        layers = overlap(found[run])
        distinct = {(entry.row.m, entry.row.k, entry.row.n): entry for entry in reversed(layers)}
        overlaps["/".join(run)] = {
            "excess": total_excess(layers),
            "rows": [
                {
                    "layer": entry.row.layer,
                    "gemm": [entry.row.m, entry.row.k, entry.row.n],
                    "scalesim_cycles": entry.row.compute_cycles,
                    "serial_cycles": entry.serial_cycles,
                    "overlapped_cycles": entry.overlapped_cycles,
                    "excess": entry.excess,
                }
                for entry in reversed(distinct.values())
            ],
        }
    moved = [traffic(found[run]) for run in _TRAFFIC_RUNS]
    return {
        "overlap": overlaps,
        "traffic": [{**asdict(row), "words_per_cycle": list(row.words_per_cycle)} for row in moved],
    }


def _eyeriss_table(network: str, found: Mapping[str, Any]) -> Table:
    rows = []
    for row in found["rows"]:
        chip, ours = row["chip"], row["ours"]
        times = f"{chip['processing_ms']:.1f}", f"{ours['processing_ms']:.1f}"
        deviations = f"{row['deviation']:+.1%}", f"{row['deviation_without_overhead']:+.1%}"
        active = f"{chip['active_elements']}", f"{ours['active_elements']}"
        rows.append((row["layer"], *times, *deviations, *active, " ".join(map(str, row["mapping"]))))
    return Table(
        f"{network}, {found['mappings']} mappings: mean absolute deviation {found['mean_absolute_deviation']:.1%}, "
        f"without the fitted overhead {found['mean_absolute_deviation_without_overhead']:.1%}",
        ("layer", "chip ms", "ours ms", "deviation", "without overhead", "active", "ours", "n e p q r t m"),
        tuple(rows),
    )


def _traffic_table(network: str, found: Mapping[str, Any]) -> Table:
    rows = []
    for row in found["rows"]:
        chip, ours = row["chip"], row["ours"]
        cells = [
            *(f"{chip['global_buffer_mb']:.1f}", f"{ours['global_buffer_mb']:.1f}", f"{row['psum_mb']:.1f}"),
            *(f"{chip['dram_mb']:.1f}", f"{ours['dram_mb']:.1f}"),
            *(f"{chip['power_mw']:.0f}", f"{ours['power_mw']:.0f}"),
        ]
        rows.append((row["layer"], *cells))
    columns = ("layer", "buffer MB, chip", "ours", "psums of it", "DRAM MB, chip", "ours", "mW, chip", "ours")
    return Table(f"{network}: traffic and power", columns, tuple(rows))


def _scalesim_tables(found: Mapping[str, Any]) -> list[Table]:
    tables = []
    for run, entry in found["overlap"].items():
        rows = tuple(
            (
                *(row["layer"], ", ".join(map(str, row["gemm"]))),
                *(f"{row[key]:,}" for key in ("scalesim_cycles", "serial_cycles", "overlapped_cycles")),
                f"{row['excess']:+.1%}",
            )
            for row in entry["rows"]
        )
        columns = ("layer", "M, K, N", "SCALE-Sim", "ours in turn", "ours overlapped", "SCALE-Sim over it")
        tables.append(Table(f"{run}: {entry['excess']:+.0%} on the network", columns, rows))
    moved = tuple(
        (
            f"{row['config']}, {row['network']}",
            *(f"{row[key]:.1f}x" for key in ("input_reads", "filter_reads", "output_writes")),
            "{:.1f} to {:.1f}".format(*row["words_per_cycle"]),
            f"{row['stall_share']:.0%}",
            f"{row['layers_beyond_edge']} of {row['layers']}",
        )
        for row in found["traffic"]
    )
    headers = (
        *("SCALE-Sim's DRAM traffic", "input read", "filters read", "output written"),
        *("words a cycle, three channels", "stalls", "layers that read beyond the map"),
    )
    return [*tables, Table("Over each map and each filter once", headers, moved)]
