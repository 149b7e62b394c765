"""SCALE-Sim's closed forms against every row of its own reports."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from accel_sim.scalesim_compat import output_size, scalesim_counts

REPORTS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "scalesim" / "ALL_LAYERS.csv"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    if not REPORTS.exists():
        pytest.skip(f"SCALE-Sim's reports are not at {REPORTS}")
    with REPORTS.open(newline="") as file:
        return list(csv.DictReader(file))


def _counts(row: dict[str, Any]) -> Any:
    m = int(row["ofmap_h"]) * int(row["ofmap_w"])
    k = int(row["R"]) * int(row["S"]) * int(row["C"])
    return scalesim_counts(row["dataflow"], int(row["array_h"]), int(row["array_w"]), m, k, int(row["K"]))


def test_every_row_is_reproduced_to_the_cycle(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 323
    wrong = [
        (row["config"], row["network"], row["layer"])
        for row in rows
        if _counts(row).cycles != float(row["total_cycles"]) - float(row["stall_cycles"])
    ]
    assert not wrong


def test_scratchpad_counts_are_reproduced(rows: list[dict[str, Any]]) -> None:
    wrong = [
        (row["config"], row["network"], row["layer"])
        for row in rows
        if (c := _counts(row))
        and (c.input_reads, c.filter_reads, c.output_writes)
        != (float(row["ifs_reads"]), float(row["fs_reads"]), float(row["os_writes"]))
    ]
    assert not wrong


def test_output_sizes_are_the_reported_ones(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        stride = int(row["stride"])
        assert output_size(int(row["H"]), int(row["R"]), stride) == int(row["ofmap_h"])
        assert output_size(int(row["W"]), int(row["S"]), stride) == int(row["ofmap_w"])


def test_the_forms_are_sensitive_to_each_term(rows: list[dict[str, Any]]) -> None:
    """All three dataflows and several array sizes are among the rows: the agreement above is no accident of one."""
    assert {row["dataflow"] for row in rows} == {"ws", "os", "is"}
    assert len({(row["array_h"], row["array_w"]) for row in rows}) >= 3


def test_an_unknown_dataflow_is_named() -> None:
    with pytest.raises(ValueError, match="'rs'"):
        scalesim_counts("rs", 4, 4, 1, 1, 1)
