"""The recipes of CONTRIBUTING.md, executed as they stand there in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, list[tuple[str, str, str]]]:
    """Code blocks as (language, title, code), by the heading that they stand under."""
    parts = re.split(r"^## (.+)$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: FENCE.findall(body) for title, body in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("passes", "codegen", "accel_sim", "tests", "tools", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def apply(checkout: Path, title: str, code: str) -> None:
    """Writes the block to the file that its title names, or puts it into the table that it names."""
    name, _, table = title.partition(" (in ")
    path = checkout / name
    if not table:
        assert not path.exists(), f"{name} exists: the recipe would overwrite it"
        path.write_text(code, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    opening = re.search(rf"^{table.rstrip(')')}: .*?^    \{{\n", text, re.MULTILINE | re.DOTALL)
    assert opening is not None, f"{name} has no table {table}"
    path.write_text(text[: opening.end()] + code + text[opening.end() :], encoding="utf-8")


def execute(checkout: Path, command: str, *path: Path) -> str:
    """Standard output of ``command`` with this Python first, ``path`` on its import path; it has to succeed."""
    bin_folder = Path(sys.executable).parent
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }
    for variable in [v for v in env if v.startswith("PYTEST_")]:
        del env[variable]  # the outer run's workers are none of the inner run's business
    done = subprocess.run(["bash", "-ec", command], cwd=checkout, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["Add a pass", "Add a format", "Add a target", "Add a solver"])
def test_a_recipe_works_as_written(recipe: str, checkout: Path) -> None:
    commands = 0
    for language, title, code in sections()[recipe]:
        if language == "bash":
            output = execute(checkout, code)
            commands += 1
            if "pytest" in code:
                passed = re.search(r"(\d+) passed", output)
                assert passed and int(passed[1]) >= 4, f"the command ran next to nothing:\n{output}"
        else:
            assert title, f"a block of {recipe} names no file"
            apply(checkout, title, code)
    assert commands == 1


@pytest.mark.slow
def test_an_outside_distribution_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """What an installer would put on the path: the module and the distribution's entry points."""
    blocks = {title: code for _, title, code in sections()["From another distribution"]}
    table = tomllib.loads(blocks["pyproject.toml"])["project"]
    (tmp_path / "rankc_roofline.py").write_text(blocks["rankc_roofline.py"])
    info = tmp_path / f"{table['name'].replace('-', '_')}-{table['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {table['name']}\nVersion: {table['version']}\n")
    ((group, points),) = table["entry-points"].items()
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    code = (
        "from codegen.target import parse_target\n"
        "from passes.core.cost import StageWork\n"
        "from passes.core.site import Geometry\n"
        "model = parse_target('roofline:macs_per_cycle=64').latency\n"
        "work = StageWork(Geometry((3, 3)), 16, 32, (10, 10), bias=False)\n"
        "print([cost.latency for cost in model.chains([(work,), (work, work)])])\n"
    )
    # 8 x 8 positions of 16 x 32 x 9 multiply-adds at 64 a cycle; the weights take 4 x 4608 / 16 cycles, which is less
    cycles = 64 * 4608 / 64
    assert execute(ROOT, f"python -c {shlex.quote(code)}", tmp_path).strip() == str([cycles, 2 * cycles])
    output = execute(ROOT, blocks[""], tmp_path)
    assert "/block2/first/Conv" in output
