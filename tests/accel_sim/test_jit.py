"""The cache of compiled kernels: where it lies, and that numba's own setting is left as it was."""

from __future__ import annotations

from pathlib import Path

import numba
import pytest

from accel_sim import jit


def test_the_users_choice_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folder = jit._cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path
    assert folder.is_dir()


def test_a_place_that_cannot_be_written_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert jit._cache_folder() is None


def test_read_only_sources_fall_back_to_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__pycache__").touch()  # a file where the folder would be
    monkeypatch.setattr(jit, "_PACKAGE", tmp_path / "package")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = jit._cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "cache" / "rankc"


def test_a_changed_source_changes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    source = tmp_path / "inner" / "kernel.py"
    source.write_text("a = 1\n", encoding="utf-8")
    monkeypatch.setattr(jit, "_PACKAGE", tmp_path)
    before = jit._sources_digest()
    assert jit._sources_digest() == before
    source.write_text("a = 2\n", encoding="utf-8")
    assert jit._sources_digest() != before


@pytest.mark.parametrize("cached", [True, False])
def test_compiled_functions_run_with_and_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(jit, "_FOLDER", tmp_path if cached else None)
    setting = numba.config.CACHE_DIR

    @jit.compiled
    def twice(value: int) -> int:
        return 2 * value

    doubled = twice(21)
    assert doubled == 42
    assert setting == numba.config.CACHE_DIR
    assert any(tmp_path.rglob("*.nbi")) == cached
