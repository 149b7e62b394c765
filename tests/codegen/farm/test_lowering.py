"""A network lowered for a device of a farm: trials, prices, the check of the binary, its latency are the device's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from codegen.farm.serve import Farm

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_latency_of_a_result_is_that_of_the_farms_device(farm: Farm, tmp_path: Path) -> None:
    server = farm.add_server("lab")
    command = [sys.executable, "tools/lower.py", "examples/digits.onnx", "--target", "cpu", "--macs", "80%"]
    command += ["--formats", "svd,channel_svd_in", "--effort", "quick", "--trials", "1", "--samples", "64"]
    command += ["--calib", "examples/digits_data.py:calibration", "--database", str(tmp_path / "trials.jsonl")]
    command += ["--rpc", str(farm.tracker), "--rpc-key", "lab", "-o", str(tmp_path / "out"), "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["baseline"]["latency"]["kind"] == report["result"]["latency"]["kind"] == "measured"
    text = json.dumps(report)
    assert f"timed on {server.address} of the farm" in text
    assert f"device {server.address}: " in text and "0 without a time" in text
