"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from passes.files import appearing, write_text


def test_those_who_write_the_same_file_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    texts = [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda text: write_text(path, text), texts))
            assert path.read_text(encoding="utf-8") in texts
    assert os.listdir(tmp_path) == ["data.json"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    write_text(path, "before")
    with pytest.raises(RuntimeError), appearing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "before"
    assert os.listdir(tmp_path) == ["data.json"]


def test_the_file_may_be_read_by_whom_the_mask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
