"""What is shipped, and that a bare checkout runs without being installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("passes", "codegen", "accel_sim")


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": "", **env}
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built by setuptools in a copy of the checkout, tools and tests included."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*PACKAGES, "tools", "tests", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    code = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    (copy / "dist").mkdir()
    built = run(sys.executable, "-c", code, cwd=copy)
    assert built.returncode == 0, built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tops == {*PACKAGES, f"rankc-{version}.dist-info"}


def test_the_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    data = [*ROOT.glob("accel_sim/targets/*.toml")]
    data += [path for kind in ("json", "html", "j2", "h", "cc") for path in ROOT.glob(f"codegen/**/*.{kind}")]
    assert any(path.suffix == ".toml" for path in data) and any(path.suffix == ".json" for path in data)
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    shipped = set(wheel.namelist())
    assert [str(p.relative_to(ROOT)) for p in data + modules if str(p.relative_to(ROOT)) not in shipped] == []


def test_the_wheel_has_the_console_script_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "rankc = codegen.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_the_tvm_pair_is_pinned_exactly() -> None:
    # newer tvm-ffi releases satisfy tvm's own requirement and crash it
    wanted = {"apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"}
    assert wanted <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert wanted <= set((ROOT / "constraints.txt").read_text().splitlines())


def test_constraints_are_exact_and_name_no_host() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if line.count("==") != 1 or "://" in line or "+" in line] == []
    assert "torch==2.13.0" in lines


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_a_tool_runs_from_anywhere_without_installation(tool: str, tmp_path: Path) -> None:
    done = run(sys.executable, str(ROOT / "tools" / tool), "--help", cwd=tmp_path, COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_the_lower_tool_uses_its_own_checkout(tmp_path: Path) -> None:
    """Another ``codegen`` in the working directory or on the path must not get in the way."""
    (tmp_path / "codegen").mkdir()
    (tmp_path / "codegen" / "__init__.py").write_text("raise SystemExit('the wrong codegen')")
    lower = str(ROOT / "tools" / "lower.py")
    done = run(sys.executable, lower, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path), COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert "--latency" in done.stdout
