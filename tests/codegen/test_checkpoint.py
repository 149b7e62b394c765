import json
from pathlib import Path

import numpy as np
import pytest

from codegen.checkpoint import CheckpointStore, RunKey, file_sha256
from passes.errors import InputError, UsageError

KEY = RunKey({"seed": 0, "budgets": {"latency": "60%"}}, {"model": "aa"}, {"rankc": "1"})


def store(folder: Path, notes: list[str]) -> CheckpointStore:
    made = CheckpointStore(folder, notes.append)
    made.bind(KEY, resume=False)
    return made


def test_arrays_and_meta_come_back_exactly(tmp_path: Path) -> None:
    notes: list[str] = []
    arrays = {"a/b": np.linspace(0, 1, 7), "flag": np.array([True, False]), "empty": np.zeros((0, 3), np.float16)}
    meta = {"cost": 0.1, "names": ["x"], "none": None}
    store(tmp_path, notes).checkpoint("svd", arrays, meta)
    again = CheckpointStore(tmp_path, notes.append)
    assert again.bind(KEY, resume=True) is True
    restored = again.restore("svd")
    assert restored is not None
    assert restored[1] == meta
    assert restored[0].keys() == arrays.keys()
    for name, array in arrays.items():
        assert restored[0][name].dtype == array.dtype
        np.testing.assert_array_equal(restored[0][name], array)
    assert again.restore("other") is None
    assert notes == []


def test_a_second_checkpoint_replaces_the_first(tmp_path: Path) -> None:
    made = store(tmp_path, [])
    made.checkpoint("s", {"a": np.zeros(3)}, {"n": 1})
    made.checkpoint("s", {"a": np.ones(3)}, {"n": 2})
    restored = made.restore("s")
    assert restored is not None
    assert (restored[0]["a"].tolist(), restored[1]) == ([1, 1, 1], {"n": 2})
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_damage_is_noticed_and_noted(tmp_path: Path) -> None:
    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-20])

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))

    for pattern in ("s.*.npz", "s.json"):
        for damage in (truncate, flip, Path.unlink):
            if (pattern, damage) == ("s.json", Path.unlink):
                continue  # then there simply is no checkpoint
            notes: list[str] = []
            made = store(tmp_path, notes)
            made.checkpoint("s", {"a": np.arange(50)}, {"text": "x" * 50})
            damage(next(tmp_path.glob(pattern)))
            assert made.restore("s") is None, (pattern, damage)
            assert len(notes) == 1 and notes[0].startswith("the checkpoint 's' is damaged ("), notes
            made.clear()


def test_a_pickle_in_place_of_the_arrays_is_never_read(tmp_path: Path) -> None:
    notes: list[str] = []
    made = store(tmp_path, notes)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        made.checkpoint("s", {"a": np.array([{}], object)}, {})
    assert made.restore("s") is None


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no name for a checkpoint"):
        store(tmp_path, []).checkpoint("../s", {}, {})


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (RunKey({**KEY.options, "seed": 1}, KEY.digests, KEY.versions), "seed was 0 and is 1"),
        (RunKey({**KEY.options, "plan": "p"}, KEY.digests, KEY.versions), 'plan was unset and is "p"'),
        (RunKey(KEY.options, {"model": "bb"}, KEY.versions), "the content of model has changed"),
        (
            RunKey({"seed": 0, "budgets": {}}, KEY.digests, {"rankc": "2"}),
            'budgets was {"latency": "60%"} and is {} (and 1 more)',
        ),
    ],
)
def test_another_run_s_state_is_refused_and_kept(tmp_path: Path, other: RunKey, difference: str) -> None:
    store(tmp_path, []).checkpoint("s", {}, {})
    with pytest.raises(UsageError) as caught:
        CheckpointStore(tmp_path, [].append).bind(other, resume=True)
    assert str(caught.value) == (
        f"--resume: the saved state belongs to another run: {difference}; go back to that, or start over with --force"
    )
    assert CheckpointStore(tmp_path, [].append).names == ("s",)
    assert other.sha256 != KEY.sha256


def test_starting_over_drops_the_state_and_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    store(tmp_path, notes).checkpoint("s", {}, {})
    assert store(tmp_path, notes).restore("s") is None
    assert notes == ["the saved state of an earlier run is dropped; --resume would have gone on from it"]


def test_nothing_to_resume_and_a_damaged_key_start_over(tmp_path: Path) -> None:
    notes: list[str] = []
    made = CheckpointStore(tmp_path, notes.append)
    assert made.bind(KEY, resume=True) is False
    made.checkpoint("s", {}, {})
    (tmp_path / "run_key.json").write_bytes(json.dumps(KEY.as_dict()).encode()[:-5])
    assert CheckpointStore(tmp_path, notes.append).bind(KEY, resume=True) is False
    assert notes == [
        "there is no saved state to resume from: the run starts from the beginning",
        "the saved state is damaged: the run starts from the beginning",
    ]
    assert made.restore("s") is None


def test_file_digests_cover_folders_and_name_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_sha256(tmp_path / "d" / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = file_sha256(tmp_path / "d")
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    assert file_sha256(tmp_path / "d") != before
    with pytest.raises(InputError, match="none: cannot be read: No such file or directory"):
        file_sha256(tmp_path / "none")
