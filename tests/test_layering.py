"""Who may import whom, read off the source: the arrows of docs/architecture.md are the only ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("passes", "codegen", "accel_sim", "tools", "tests", "examples")

# The first pattern that a module matches says which of our modules it may import.
LAYERS = {
    "passes.core*": ("passes.core", "passes.errors"),
    "passes*": ("passes",),
    "accel_sim*": ("accel_sim",),
    "codegen*": ("codegen", "passes", "accel_sim"),
}

# Libraries that are slow to import (torch 3 s, tvm 6 s) stand at the top of these modules and nowhere else; whoever
# needs them elsewhere imports them in the function.
HEAVY = {
    "tvm": ("codegen.tvm_*", "codegen.tune*"),
    "tvm_ffi": ("codegen.tvm_*", "codegen.tune*"),
    "torch": (
        "passes.torch_apply",
        "passes.onnx_torch_*",
        "passes.onnx_stepper",
        "passes.correct",
        "passes.sensitivity",
        "passes.onnx_module*",
        "passes.fx_*",
        "passes.training*",
        "codegen.api*",
        "codegen.torch_models",
        "codegen.reproduce*",
        "codegen.train*",
        "codegen.verification",
        "codegen.walks",
    ),
    "onnx": (
        "passes.onnx_*",
        "passes.fx_export",
        "passes.fx_rewritten",
        "codegen.api",
        "codegen.reproduce.run",
        "codegen.quantized.*",
        "codegen.asic_compile.host_layer",
        "codegen.asic_binary.build",
        "codegen.asic_binary.host_graph",
        "codegen.asic_program",
    ),
    "onnx_graphsurgeon": ("passes.onnx_*",),
    "onnxruntime": (
        "passes.onnx_*",
        "passes.fx_export",
        "codegen.onnx_runs",
        "codegen.quantized.*",
        "codegen.asic_compile.run",
        "codegen.asic_program",
    ),
    "numba": ("accel_sim*",),
    "scipy": ("passes.core*", "passes.ranks*", "codegen.tune.predictor"),
    "sklearn": (),
}


@cache
def modules() -> dict[str, Path]:
    """Our shipped modules by name."""
    found = {}
    for top in ("passes", "codegen", "accel_sim"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Every import of a file as (full name, whether it runs when the module is imported)."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import"
                assert child.module is not None
                yield from ((f"{child.module}.{alias.name}", at_import) for alias in child.names)
            else:
                inner = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                    inner = False
                yield from walk(child, inner)

    return tuple(walk(ast.parse(path.read_text(encoding="utf-8")), True))


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_scan_sees_the_project() -> None:
    assert {"passes.manager", "passes.core.site", "codegen", "accel_sim"} <= set(modules())
    assert ("passes.core.site.Chain", True) in imports(modules()["passes.graph"])


@pytest.mark.parametrize("name", modules())
def test_imports_follow_the_layers(name: str) -> None:
    allowed = next(packages for pattern, packages in LAYERS.items() if fnmatch(name, pattern))
    ours = [target for target, _ in imports(modules()[name]) if within(target, OURS)]
    assert [target for target in ours if not within(target, allowed)] == []


@pytest.mark.parametrize("name", modules())
def test_slow_libraries_stand_at_the_top_of_few_modules(name: str) -> None:
    top = {target.split(".")[0] for target, at_import in imports(modules()[name]) if at_import}
    misplaced = [
        library
        for library, places in HEAVY.items()
        if library in top and not any(fnmatch(name, place) for place in places)
    ]
    assert misplaced == []


def test_starting_the_command_line_imports_nothing_slow() -> None:
    code = f"import sys, codegen.cli; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == []


def test_no_module_hides_a_library() -> None:
    names = {part for module in modules() for part in module.split(".")[-1:]}
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert names.isdisjoint({"onnx", "torch", "tvm", "numba", "scipy", "utils", "helpers", "common"})
    assert tools.isdisjoint({"profile", "torch", "onnx", "tvm"})
