"""The cache of compiled kernels: where it lies, and that numba's own setting is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numba
import pytest

from accel_sim import jit

PACKAGE = Path(jit.__file__).parent
KERNEL = PACKAGE / "pricing" / "candidates.py"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is remembered of folders and imports is each test's own."""
    remembered = (jit._cache_folder, jit._imports)
    for each in remembered:
        each.cache_clear()
    yield
    for each in remembered:
        each.cache_clear()


def test_the_users_choice_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folder = jit._cache_folder(KERNEL)
    assert folder is not None
    assert folder.parent == tmp_path
    assert folder.is_dir()


def test_a_place_that_cannot_be_written_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert jit._cache_folder(KERNEL) is None


def test_read_only_sources_fall_back_to_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__pycache__").touch()  # a file where the folder would be
    monkeypatch.setattr(jit, "_PACKAGE", tmp_path / "package")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = jit._cache_folder(KERNEL)
    assert folder is not None
    assert folder.parent == tmp_path / "cache" / "rankc"


def digests(package: Path) -> dict[str, str]:
    jit._imports.cache_clear()
    return {path.name: jit._digest(path) for path in sorted(package.rglob("*.py"))}


def test_a_change_reaches_all_kernels_that_it_can_be_compiled_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """outer -> middle -> inner/kernel, by each kind of import; nothing imports aside, which imports all."""
    package = tmp_path / "simulator"
    (package / "inner").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "inner/__init__.py": "from simulator import constants\n",
        "inner/kernel.py": "FACTOR = 2\n",
        "constants.py": "LIMIT = 1\n",
        "middle.py": "from simulator.inner import kernel\n",
        "outer.py": "def f():\n    import simulator.middle\n",
        "aside.py": "from simulator.outer import f\nimport numpy\n",
    }.items():
        (package / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(jit, "_PACKAGE", package)
    before = digests(package)
    assert digests(package) == before
    for name, reached in {
        "inner/kernel.py": {"kernel.py", "middle.py", "outer.py", "aside.py"},
        "constants.py": {"constants.py", "__init__.py", "middle.py", "outer.py", "aside.py"},
        "aside.py": {"aside.py"},
    }.items():
        path = package / name
        text = path.read_text(encoding="utf-8")
        path.write_text(text + "EDITED = True\n", encoding="utf-8")
        after = digests(package)
        assert {file for file in before if before[file] != after[file]} == reached
        path.write_text(text, encoding="utf-8")
        assert digests(package) == before


def test_every_source_that_a_kernel_names_is_in_its_digest() -> None:
    """Whatever the kernels of our own modules see as globals was made in a file that is hashed for them."""
    import importlib

    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if "jit import compiled" in path.read_text("utf-8")]
    assert len(modules) > 10
    for path in modules:
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        hashed = set(jit._sources(path))
        assert {path, Path(jit.__file__)} <= hashed and len(hashed) < 30
        for kernel in vars(module).values():
            python = getattr(kernel, "py_func", None)
            if python is not None:
                assert Path(python.__code__.co_filename) in hashed


@pytest.mark.parametrize("cached", [True, False])
def test_compiled_functions_run_with_and_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(jit, "_cache_folder", lambda module: tmp_path if cached else None)
    setting = numba.config.CACHE_DIR

    @jit.compiled
    def twice(value: int) -> int:
        return 2 * value

    doubled = twice(21)
    assert doubled == 42
    assert setting == numba.config.CACHE_DIR
    assert any(tmp_path.rglob("*.nbi")) == cached
