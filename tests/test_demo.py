"""`make demo`: the very command of the Makefile, and what it promises."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from examples.digits_data import digits

pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")

ROOT = Path(__file__).resolve().parent.parent


def demo_command(output: Path) -> list[str]:
    """The Makefile's command, with this Python in place of the one in .venv."""
    listed = subprocess.run(
        ["make", "--dry-run", "demo", f"DEMO_OUT={output}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert listed.returncode == 0, listed.stderr
    (line,) = [line for line in listed.stdout.replace("\\\n", " ").splitlines() if "tools/lower.py" in line]
    python, *rest = shlex.split(line)
    assert python == ".venv/bin/python"
    return [sys.executable, *rest]


@pytest.mark.slow
def test_the_demo_meets_its_budget_and_keeps_its_accuracy(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    command = demo_command(output)
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    (budget,) = report["budgets"]
    assert budget["metric"] == "latency" and budget["met"]
    assert report["result"]["latency"]["value"] <= 0.6 * report["baseline"]["latency"]["value"]
    # counted here once more, on the written file
    images, labels = digits("test")
    found = {}
    for name, path in (("baseline", ROOT / "examples" / "digits.onnx"), ("result", output / "model.onnx")):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found[name] = float(np.mean(session.run(None, {"image": images})[0].argmax(1) == labels))
        assert report[name]["accuracy"]["value"] == pytest.approx(found[name])
    assert found["baseline"] == pytest.approx(535 / 539)
    assert found["result"] >= found["baseline"] - 0.01
    assert "latency" in done.stdout and "accuracy" in done.stdout
