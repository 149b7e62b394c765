from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen.dataset import bind_shapes, load, random_inputs
from passes.errors import InputError, UnsupportedError, UsageError
from passes.graph import TensorSpec

IMAGE = TensorSpec("image", "float32", ("N", 3, 4, 4))
ROWS = np.arange(5 * 48, dtype=np.float32).reshape(5, 3, 4, 4)


def test_npz_with_labels(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, image=ROWS, labels=np.arange(5))
    data = load(str(path), (IMAGE,))
    assert (data.count, data.dynamic, data.dropped) == (5, True, 0)
    np.testing.assert_array_equal(data.feeds["image"], ROWS)
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, np.arange(5))
    assert [len(feed["image"]) for feed in data.batches(2)] == [2, 2, 1]


@pytest.mark.parametrize("key", ["x", "arr_0"])
def test_one_input_takes_an_unnamed_array(tmp_path: Path, key: str) -> None:
    np.savez(tmp_path / "d.npz", **{key: ROWS})
    np.testing.assert_array_equal(load(str(tmp_path / "d.npz"), (IMAGE,)).feeds["image"], ROWS)


def test_npy_and_folders_read_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", ROWS)
    parts, singles, named, archives = (tmp_path / n for n in ("parts", "singles", "named", "archives"))
    for folder in (parts, singles, named, archives):
        folder.mkdir()
    np.save(parts / "a.npy", ROWS[:2])
    np.save(parts / "b.npy", ROWS[2:])
    for i, row in enumerate(ROWS):
        np.save(singles / f"{i}.npy", row)
    np.save(singles / "labels.npy", np.arange(5))
    np.save(named / "image.npy", ROWS)
    np.savez(archives / "a.npz", image=ROWS[:1], labels=[0])
    np.savez(archives / "b.npz", image=ROWS[1:], labels=[1, 2, 3, 4])
    for source in (tmp_path / "d.npy", parts, singles, named, archives):
        np.testing.assert_array_equal(load(str(source), (IMAGE,)).feeds["image"], ROWS, err_msg=str(source))
    for source in (singles, archives):
        labels = load(str(source), (IMAGE,), limit=3).labels
        assert labels is not None
        np.testing.assert_array_equal(labels, np.arange(3), err_msg=str(source))


def test_a_script_yields_dicts_and_is_not_asked_for_more_than_needed(tmp_path: Path) -> None:
    (tmp_path / "sibling.py").write_text("SCALE = 2\n")
    script = tmp_path / "load.py"
    script.write_text(
        "import itertools, numpy as np\n"
        "from sibling import SCALE\n"
        "def load_data():\n"
        "    for i in itertools.count():\n"
        "        yield {'image': np.full((2, 3, 4, 4), SCALE * i, np.float32), 'labels': [i, i]}\n"
        "def other():\n"
        "    return [{'image': np.ones((1, 3, 4, 4), np.float32)}]\n"
    )
    data = load(str(script), (IMAGE,), limit=5)
    np.testing.assert_array_equal(data.feeds["image"][:, 0, 0, 0], [0, 0, 2, 2, 4])
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 1, 2])
    assert load(f"{script}:other", (IMAGE,)).count == 1


def test_fixed_batches_states_and_scalars(tmp_path: Path) -> None:
    specs = (
        TensorSpec("wave", "float32", (1, 8)),
        TensorSpec("state", "float32", (2, 1, 4)),
        TensorSpec("rate", "int64", ()),
    )
    wave = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    state = np.arange(8, dtype=np.float32).reshape(2, 1, 4)
    np.savez(tmp_path / "once.npz", wave=wave, state=state, rate=np.int32(16000))
    np.savez(tmp_path / "each.npz", wave=wave, state=np.stack([state] * 3), rate=np.full(3, 16000))
    for name in ("once.npz", "each.npz"):
        feeds = list(load(str(tmp_path / name), specs).batches(64))
        assert len(feeds) == 3, "a fixed batch runs sample by sample"
        for i, feed in enumerate(feeds):
            np.testing.assert_array_equal(feed["wave"], wave[i : i + 1])
            np.testing.assert_array_equal(feed["state"], state)
            assert feed["rate"].shape == () and feed["rate"] == 16000 and feed["rate"].dtype == np.int64


def test_a_fixed_batch_takes_chunks_and_counts_what_is_left(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=ROWS, labels=np.arange(5))
    data = load(str(tmp_path / "d.npz"), bind_shapes((IMAGE,), {"image": (2, 3, 4, 4)}))
    assert (data.count, data.dropped, data.dynamic) == (2, 1, False)
    np.testing.assert_array_equal([feed["image"] for feed in data.batches(9)], [ROWS[:2], ROWS[2:4]])
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, [0, 1, 2, 3])
    np.testing.assert_array_equal(data.head(1).feeds["image"], ROWS[:2])


def test_floats_and_integers_are_converted_within_their_kind(tmp_path: Path) -> None:
    specs = (IMAGE, TensorSpec("ids", "int64", ("N", 2)))
    np.savez(tmp_path / "d.npz", image=ROWS.astype(np.float64), ids=np.ones((5, 2), np.uint8))
    feeds = load(str(tmp_path / "d.npz"), specs).feeds
    assert (feeds["image"].dtype, feeds["ids"].dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(feeds["image"], ROWS)


def saved(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def flipped(path: Path) -> None:
    np.savez(path, image=ROWS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncated(path: Path) -> None:
    np.savez(path, image=ROWS)
    path.write_bytes(path.read_bytes()[:-30])


BAD = np.where(np.arange(240).reshape(ROWS.shape) < 2, np.nan, ROWS)
PICKLE = "it is no NumPy array file, or holds Python objects, which are never unpickled"
NEEDS = "needs 'image' float32 (N, 3, 4, 4)"


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (saved(img=ROWS), f"'img' is no input of the network; {NEEDS}"),
        (saved(labels=[1]), f"has no data for the input 'image'; {NEEDS}"),
        (saved(image=ROWS[:, :, :3]), "'image' has shape (5, 3, 3, 4), expected (N, 3, 4, 4)"),
        (saved(image=ROWS[0]), "'image' has shape (3, 4, 4), expected (N, 3, 4, 4)"),
        (saved(image=ROWS[:0]), "'image' is empty: shape (0, 3, 4, 4), expected (N, 3, 4, 4)"),
        (
            saved(image=ROWS.astype(np.uint8)),
            "'image' is uint8, expected float32; convert and scale it the way the network was trained",
        ),
        (saved(image=ROWS.astype(complex)), "'image' is complex128, expected float32"),
        (saved(image=np.full(ROWS.shape, "a")), "'image' is <U1, expected float32"),
        (saved(image=BAD), "'image' holds 2 NaN or infinite values of 240"),
        (saved(image=np.full(ROWS.shape, 1e300)), "'image' holds values too large for float32"),
        (saved(image=ROWS, labels=[1, 2]), "'labels' has 2 entries for 5 rows of data"),
        (saved(image=np.array([{}], object)), f"'image' cannot be read: {PICKLE}"),
        (written(b""), "not a readable .npz file: No data left in file"),
        (written(b"\x80\x04nonsense"), f"not a readable .npz file: {PICKLE}"),
        (truncated, "not a readable .npz file: File is not a zip file"),
        (flipped, "'image' cannot be read: Bad CRC-32 for file 'image.npy'"),
    ],
)
def test_bad_archives_are_one_line(tmp_path: Path, write: Callable[[Path], None], line: str) -> None:
    path = tmp_path / "d.npz"
    write(path)
    with pytest.raises(InputError) as caught:
        load(str(path), (IMAGE,))
    assert str(caught.value) == f"{path}: {line}"


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("x = 1", "{path}: defines no function load_data(); name it as load.py:FUNCTION"),
        (
            "def load_data(): return [[1]]",
            "{path}:load_data, item 0: is a list, expected a dict of arrays by input name",
        ),
        ("def load_data(): return 3", "{path}:load_data: raised TypeError: 'int' object is not iterable"),
        ("def load_data():\n    yield 1 / 0", "{path}:load_data, item 0: raised ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found", "{path}: raised ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("import sys; sys.exit('no')", "{path}: raised SystemExit: no"),
        ("def load_data(): return []", "{path}: has no data for the input 'image'; " + NEEDS),
        (
            "import numpy as np\ndef load_data():\n    yield {'image': np.ones((2, 3, 4, 9), 'f4')}",
            "{path}:load_data, item 0: 'image' has shape (2, 3, 4, 9), expected (N, 3, 4, 4)",
        ),
    ],
)
def test_bad_scripts_are_one_line(tmp_path: Path, code: str, line: str) -> None:
    path = tmp_path / "load.py"
    path.write_text(code)
    with pytest.raises(InputError) as caught:
        load(str(path), (IMAGE,))
    assert str(caught.value) == line.format(path=path)


def test_a_script_leaves_the_module_path_alone(tmp_path: Path) -> None:
    import sys

    before = list(sys.path)
    (tmp_path / "load.py").write_text("raise ValueError('x')")
    with pytest.raises(InputError):
        load(str(tmp_path / "load.py"), (IMAGE,))
    assert sys.path == before


def test_bad_places_are_one_line(tmp_path: Path) -> None:
    def line(source: Path, specs: tuple[TensorSpec, ...] = (IMAGE,)) -> str:
        with pytest.raises(InputError) as caught:
            load(str(source), specs)
        return str(caught.value).replace(str(tmp_path), "D")

    assert line(tmp_path / "none.npz") == "D/none.npz: no such file or folder"
    assert line(tmp_path / "none.py") == "D/none.py: no such script"
    assert line(tmp_path) == "D: holds neither .npz nor .npy files"
    (tmp_path / "d.pkl").write_bytes(b"x")
    assert line(tmp_path / "d.pkl") == "D/d.pkl: data comes as .npz, .npy, a folder of them or script.py[:function]"
    np.save(tmp_path / "a.npy", np.array([{}], object))
    assert line(tmp_path / "a.npy") == f"D/a.npy: not a readable .npy file: {PICKLE}"
    two = (IMAGE, TensorSpec("mask", "bool", ("N",)))
    assert line(tmp_path / "a.npy", two) == (
        "D/a.npy: bare .npy data serves networks of one input, this one has image, mask; "
        "use .npz with these names as keys"
    )
    np.savez(tmp_path / "b.npz", image=ROWS, mask=np.ones(4, bool))
    assert line(tmp_path / "b.npz", two) == (
        "D/b.npz: 'mask' holds 4 samples, but 'image' holds 5; all inputs need as many"
    )
    assert line(tmp_path) == "D: holds both .npz and .npy files; keep one kind"


def test_samples_of_different_size_and_disagreeing_symbols(tmp_path: Path) -> None:
    specs = (TensorSpec("a", "float32", ("N", "T")), TensorSpec("b", "float32", ("N", "T")))
    np.savez(tmp_path / "d.npz", a=np.ones((2, 3)), b=np.ones((2, 4)))
    with pytest.raises(InputError) as caught:
        load(str(tmp_path / "d.npz"), specs)
    assert str(caught.value) == f"{tmp_path}/d.npz: dimension 'T' is 3 in 'a' and 4 in 'b'"
    script = tmp_path / "load.py"
    script.write_text(
        "import numpy as np\ndef load_data():\n    for n in (3, 4): yield dict.fromkeys('ab', np.ones((1, n)))\n"
    )
    with pytest.raises(InputError) as caught:
        load(str(script), specs)
    assert str(caught.value) == (
        f"{script}:load_data, item 1: 'a' has samples of shape (4,), but those before ({script}:load_data, item 0) "
        "have (3,); all samples of a run share one shape"
    )


def test_integers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", ids=np.array([[1], [300]]))
    with pytest.raises(InputError) as caught:
        load(str(tmp_path / "d.npz"), (TensorSpec("ids", "uint8", ("N", 1)),))
    assert str(caught.value) == f"{tmp_path}/d.npz: 'ids' holds values that do not fit uint8: 1 to 300"


def test_random_inputs_are_seeded_and_typed() -> None:
    specs = (IMAGE, TensorSpec("ids", "int64", (None, 6)), TensorSpec("flag", "bool", ()))
    first, again, other = (random_inputs(specs, {}, 4, seed) for seed in (1, 1, 2))
    assert first.digest() == again.digest() != other.digest()
    assert {n: (a.dtype.name, a.shape) for n, a in first.feeds.items()} == {
        "image": ("float32", (4, 3, 4, 4)),
        "ids": ("int64", (4, 6)),
        "flag": ("bool", (4,)),
    }
    assert set(np.unique(first.feeds["ids"])) <= {0, 1}


def test_open_dimensions_and_wrong_shapes_are_usage_errors() -> None:
    frame = TensorSpec("frame", "float32", ("batch", 3, "height", None))

    def line(*args: Any) -> str:
        with pytest.raises(UsageError) as caught:
            random_inputs(*args, 2, 0)
        return str(caught.value)

    assert line((frame,), {}) == (
        "input 'frame' has the symbolic dimension height; give --shape frame=1,3,height,? with numbers, or --calib data"
    )
    assert line((frame,), {"fram": (1,)}) == "--shape fram: no input is called so; inputs: frame"
    assert line((frame,), {"frame": (1, 4, 8, 8)}) == (
        "--shape frame=1,4,8,8 does not fit the network, which has (N, 3, height, ?)"
    )
    assert random_inputs((frame,), {"frame": (2, 3, 8, 6)}, 3, 0).feeds["frame"].shape == (6, 3, 8, 6)


def test_string_inputs_are_unsupported() -> None:
    with pytest.raises(UnsupportedError, match=r"^input 't' is str; data can feed floats, integers and booleans$"):
        random_inputs((TensorSpec("t", "str", ("N",)),), {}, 1, 0)
