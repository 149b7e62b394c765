"""What docs/validation.md says of SCALE-Sim's machine, from its own reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel_sim.validation.scalesim import ReportRow, overlap, read_reports, runs, total_excess, traffic

REPORTS = Path(__file__).resolve().parents[4] / "shared" / "reference" / "scalesim" / "ALL_LAYERS.csv"
WS = ("s32_ws_calc", "Resnet18")


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], list[ReportRow]]:
    if not REPORTS.exists():
        pytest.skip(f"SCALE-Sim's reports are not at {REPORTS}")
    return runs(read_reports(REPORTS))


def test_weight_load_and_compute_never_overlap(reports: dict[tuple[str, str], list[ReportRow]]) -> None:
    found = overlap(reports[WS])
    assert total_excess(found) == pytest.approx(0.67, abs=0.005)
    worst = max(found, key=lambda entry: entry.excess)
    assert (worst.row.m, worst.row.k, worst.row.n) == (25, 4608, 512)
    assert worst.excess == pytest.approx(2.71, abs=0.005)
    # Against our array without overlap, a fold's last write is missing: half a percent.
    serial = sum(entry.serial_cycles for entry in found) / sum(entry.row.compute_cycles for entry in found)
    assert serial == pytest.approx(1.0045, abs=0.0005)


def test_the_drain_of_output_stationary_arrays_is_missing(reports: dict[tuple[str, str], list[ReportRow]]) -> None:
    """ceil(M/R) ceil(N/C) times R cycles, and one for the last index."""
    for entry in overlap(reports["s32_os_calc", "Resnet18"]):
        folds = -(-entry.row.m // 32) * -(-entry.row.n // 32)
        assert entry.serial_cycles - entry.row.compute_cycles == 32 * folds + 1


def test_partial_sums_go_to_dram_and_never_come_back(reports: dict[tuple[str, str], list[ReportRow]]) -> None:
    """One set of M x N words per fold of K, and no column of reads that could bring them back."""
    for row in reports[WS]:
        sets = row.m * row.n * -(-row.k // row.rows)
        assert sets <= row.output_dram_writes <= 1.001 * sets
    assert traffic(reports[WS]).output_writes == pytest.approx(20.1, abs=0.05)


def test_maps_are_fetched_expanded_and_beyond_their_edge(reports: dict[tuple[str, str], list[ReportRow]]) -> None:
    found = traffic(reports[WS])
    assert found.input_reads == pytest.approx(16.9, abs=0.05)
    assert found.layers_beyond_edge == 7
    assert {row.layer for row in reports[WS] if row.beyond_edge} == {
        *("Conv1", "Conv3_1a", "Conv3_s", "Conv4_1a", "Conv4_s", "Conv5_1a", "Conv5_s")
    }


def test_three_channels_of_ten_words_move_more_than_ten(reports: dict[tuple[str, str], list[ReportRow]]) -> None:
    """The run with a bandwidth of 10 words a cycle: 20.8 to 27.9 on average over whole layers."""
    found = traffic(reports["s32_ws_user", "alexnet"])
    assert found.words_per_cycle[0] > 20 and found.words_per_cycle[1] < 30
    assert found.stall_share == pytest.approx(0.94, abs=0.005)
    assert found.input_reads > 400 and found.filter_reads > 39
