"""The comparison of exact solver and rank search by gradient, on a network of seconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from codegen.bench.cifar10 import images
from codegen.bench.solvers_haloc import ROWS, SolversHaloc
from codegen.events import QuietEvents, RecordingEvents
from passes.errors import UsageError
from passes.training import haloc
from tests.codegen.bench.tiny import write_folders


def test_all_rows_keep_the_budget_and_are_judged_on_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, data = write_folders(tmp_path, calibration=90, test=1)
    # the images to judge by are labelled by the network itself: on them it is right everywhere
    shutil.copy(data / "cifar10" / "train_0.npz", data / "cifar10" / "train_3.npz")
    (data / "cifar10" / "test.npz").unlink()
    monkeypatch.setitem(haloc.EFFORTS, "quick", haloc.HalocOptions(rounds=1, steps=2, batch=8))
    bench = SolversHaloc(models, data, budgets=(60,), effort="quick", calibration=60, samples=30, images=20)
    events = RecordingEvents(QuietEvents())
    result = bench.run(events)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["calibration_images"], result["search_images"], result["held_out"]) == (60, 30, 20)
    dense, *rows = result["rows"]
    assert dense["accuracy"] == 1.0
    assert [row["row"] for row in rows] == list(ROWS)
    assert all(row["met"] and row["latency_ratio"] <= 0.6 + 1e-9 and row["loss"] > 0 for row in rows)
    assert rows[0]["same"] == 1.0 and events.steps["search with haloc"] == 4
    # every right answer counts a twentieth
    assert all(round(row["accuracy"] * 20) == pytest.approx(row["accuracy"] * 20) for row in rows)
    (table,) = bench.tables(result)
    assert [row[0] for row in table.rows] == ["dense", *ROWS.values()]
    with pytest.raises(UsageError, match="too few"):
        replace(bench, calibration=89).run(QuietEvents())


def test_the_last_images_are_the_last(tmp_path: Path) -> None:
    _, data = write_folders(tmp_path, calibration=30, test=1)
    x, y = images(data, "train_0.npz", 0, None)
    last, labels = images(data, "train_0.npz", -7, None)
    assert (last == x[-7:]).all() and (labels == y[-7:]).all()
