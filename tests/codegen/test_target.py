import json
from importlib.metadata import EntryPoint
from importlib.resources import files
from pathlib import Path

import pytest

import codegen.tvm_versions
import passes.registry
from codegen.target import Target, parse_target
from passes.core.cost import StageWork
from passes.core.site import Geometry
from passes.errors import InputError, UsageError

CONV = (StageWork(Geometry((3, 3), pads=(1, 1, 1, 1)), 32, 32, (16, 16)),)
KNOWN = "asic, cpu, cuda, edge_16x16, eyeriss_12x14, gemmini_16x16, tpu_256x256"


def test_the_default_machine_under_both_its_names() -> None:
    asic, edge = parse_target("asic"), parse_target("edge_16x16")
    assert asic.spec == edge.spec and asic.spec["array"]["rows"] == 16
    assert (asic.name, edge.name, asic.clock_hz) == ("asic", "edge_16x16", 1e9)
    assert asic.latency.unit == "cycles"
    json.dumps(asic.spec, allow_nan=False)
    assert asic.versions["apache-tvm"] == "0.27.0.post1"


def test_overrides_change_the_machine_and_its_prices() -> None:
    wide = parse_target("asic:rows=32, columns=32")
    assert (wide.spec["array"]["rows"], wide.spec["array"]["columns"]) == (32, 32)
    (fast,), (slow,) = wide.latency.chains([CONV]), parse_target("asic").latency.chains([CONV])
    assert fast.latency < slow.latency


def test_a_machine_in_a_file_with_overrides(tmp_path: Path) -> None:
    text = (files("accel_sim") / "targets" / "edge_16x16.toml").read_text()
    path = tmp_path / "chip.toml"
    path.write_text(text.replace("clock_mhz = 1000.0", "clock_mhz = 250.0"))
    assert parse_target(str(path)).clock_hz == 250e6
    target = parse_target(f"{path}:rows=8")
    assert (target.name, target.spec["array"]["rows"]) == ("chip.toml:rows=8", 8)


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ("gpu", UsageError, f"unknown target 'gpu'; there are: {KNOWN}, or the path of a machine's .toml file"),
        ("gpu:a=x", UsageError, f"unknown target 'gpu'; there are: {KNOWN}, or the path of a machine's .toml file"),
        ("cpu:rows=8", UsageError, "a CPU target has no option 'rows': mcpu, mtriple, mattr, threads"),
        ("asic:", UsageError, "--target 'asic:': options are written name:key=value,key=value"),
        ("asic:rows", UsageError, "--target 'asic:rows': options are written name:key=value,key=value"),
        ("asic:rows=1,rows=2", UsageError, "--target 'asic:rows=1,rows=2': rows is given twice"),
        ("asic:rows=many", UsageError, "--target 'asic:rows=many': override rows=many: expected a whole number"),
    ],
)
def test_what_is_no_target_is_one_line(text: str, error: type[Exception], line: str) -> None:
    with pytest.raises(error) as caught:
        parse_target(text)
    assert str(caught.value) == line


def test_an_unusable_machine_file_is_input(tmp_path: Path) -> None:
    for content in (None, b"\xff", b"rows = ", b"name = 'x'\n"):
        path = tmp_path / "chip.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            parse_target(f"{path}:rows=3")
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_wrong_tvm_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen.tvm_versions, "version", lambda package: "9")
    with pytest.raises(InputError, match="apache-tvm 9 is installed, but rankc runs with"):
        parse_target("asic")


class OutsideTarget:
    name = "outside"

    def make(self, written: str, options: dict[str, str]) -> Target:
        inner = parse_target("asic")
        return Target(written, dict(options), inner.latency, inner.emit, None, {})


def test_another_distribution_s_target_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("outside", f"{__name__}:OutsideTarget", "rankc.targets")
    monkeypatch.setattr(EntryPoint, "load", lambda self: OutsideTarget)
    monkeypatch.setattr(passes.registry, "entry_points", lambda group: [point] if group == "rankc.targets" else [])
    target = parse_target("outside:speed=3")
    assert (target.name, target.spec) == ("outside:speed=3", {"speed": "3"})
