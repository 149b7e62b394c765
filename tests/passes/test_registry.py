from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from passes.core.formats import FORMATS as BUILTIN_FORMATS
from passes.errors import UsageError
from passes.fold_batchnorm import FoldBatchNorm
from passes.manager import Pass
from passes.ranks.milp import MilpSolver
from passes.registry import FORMATS, PASSES, SOLVERS


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution "outside 1.2" on the path: formats fine, broken at import, none, misnamed, a double."""
    info = tmp_path / "outside-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[rankc.formats]\n"
        "extra = outside_formats:Extra\n"
        "broken = outside_formats_missing:Thing\n"
        "wrong = outside_formats:Wrong\n"
        "svd = outside_formats:Extra\n"
        "alias = outside_formats:Extra\n"
    )
    (tmp_path / "outside_formats.py").write_text(
        "from dataclasses import dataclass\n"
        "from passes.core.formats.svd import Svd\n"
        "@dataclass(frozen=True)\nclass Extra(Svd):\n    name: str = 'extra'\n"
        "class Wrong:\n    name = 'wrong'\n    full_rank = widths = geometries = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_everything_built_in_loads_under_its_own_name() -> None:
    assert FORMATS.names()[: len(BUILTIN_FORMATS)] == tuple(BUILTIN_FORMATS)
    for name, format in BUILTIN_FORMATS.items():
        assert FORMATS.load(name) is format and format.name == name
    for name in PASSES.builtin:
        loaded = PASSES.load(name)
        assert issubclass(loaded, Pass) and loaded.name == name
    for name in SOLVERS.builtin:
        assert SOLVERS.load(name).name == name
    assert PASSES.load("fold-batchnorm") is FoldBatchNorm
    assert isinstance(SOLVERS.load("milp"), MilpSolver)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UsageError) as caught:
        SOLVERS.load("milq")
    assert str(caught.value) == "unknown solver 'milq' (did you mean milp?); there are: milp, uniform, haloc"
    with pytest.raises(UsageError, match=r"^unknown pass 'xyz'; there are: fold-batchnorm, drop-identities"):
        PASSES.load("xyz")


@pytest.mark.usefixtures("outside")
def test_an_entry_point_adds_a_format() -> None:
    assert "extra" in FORMATS.names()
    assert FORMATS.load("extra").name == "extra"


@pytest.mark.usefixtures("outside")
def test_a_broken_entry_point_is_told_and_stops_nobody_else() -> None:
    with pytest.raises(UsageError) as caught:
        FORMATS.load("broken")
    assert str(caught.value) == (
        "format 'broken' of outside 1.2 cannot be loaded from outside_formats_missing:Thing: "
        "ModuleNotFoundError: No module named 'outside_formats_missing'"
    )
    formats, notes = FORMATS.load_all()
    assert set(formats) == {*BUILTIN_FORMATS, "extra"}
    assert {note.node: note.reason.split(": ")[-1] for note in notes} == {
        "svd": "outside 1.2 offers a format 'svd'; the built-in one is used",
        "broken": "No module named 'outside_formats_missing'",
        "wrong": "it has no decompose",
        "alias": "it calls itself 'extra'",
    }
    assert formats["svd"] is BUILTIN_FORMATS["svd"]
