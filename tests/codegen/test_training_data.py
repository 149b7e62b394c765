"""Training data and augmentations from the sources of --train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from codegen.events import QuietEvents
from codegen.training_data import ScriptAugmentation, augmentation, load_training
from passes.errors import InputError, UsageError
from passes.graph import TensorSpec
from passes.training.augment import crop_flip, none
from passes.training.data import generator

IMAGE = TensorSpec("x", "float32", ("N", 3, 4, 4))
X = np.random.default_rng(0).standard_normal((6, 3, 4, 4)).astype(np.float32)
Y = np.array([0, 2, 1, 1, 0, 2])


def npz(folder: Path, **arrays: object) -> str:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return str(folder / "data.npz")


def script(folder: Path, text: str) -> str:
    path = folder / "load.py"
    path.write_text(text)
    return str(path)


def test_samples_with_their_classes(tmp_path: Path) -> None:
    for labels in (Y, Y.astype(np.uint8), Y[:, None]):
        data = load_training(npz(tmp_path, x=X, labels=labels), [IMAGE])
        assert torch.equal(data.inputs["x"], torch.from_numpy(X))
        assert data.labels is not None and data.labels.dtype == torch.int64 and data.labels.tolist() == Y.tolist()
    assert load_training(npz(tmp_path, x=X), [IMAGE]).labels is None


def test_inputs_stand_in_the_order_of_the_network(tmp_path: Path) -> None:
    second = TensorSpec("a", "int64", (1, 2))
    data = load_training(npz(tmp_path, a=np.ones((6, 2), np.int32), x=X), [IMAGE, second])
    assert list(data.inputs) == ["x", "a"] and data.inputs["a"].dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(6, 3), r"'labels' is float64 \(6, 3\), expected the class of each sample"),
        (Y.astype(np.float32), "'labels' is float32"),
        (Y - 1, "holds the class -1"),
        (Y[:4], "'labels' has 4 entries for 6 rows"),
    ],
)
def test_labels_that_are_no_classes(labels: np.ndarray, message: str, tmp_path: Path) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=message):
        load_training(npz(tmp_path, x=X, labels=labels), [IMAGE])


@pytest.mark.parametrize(("shape", "what"), [((2, 3), "takes 2 rows a sample"), ((), "is a scalar")])
def test_inputs_that_take_another_number_of_rows(shape: tuple[int, ...], what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the input 's' {what}; training needs"):
        load_training(npz(tmp_path, x=X, s=np.zeros(6, np.float32)), [IMAGE, TensorSpec("s", "float32", shape)])


class Watching(QuietEvents):
    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Watching]:
        assert name == "read the training data"
        yield self

    def advance(self, n: int = 1, note: str = "") -> None:
        self.told.append((n, note))


def test_reading_tells_how_far_it_is(tmp_path: Path) -> None:
    source = script(
        tmp_path,
        "import numpy as np\ndef load_data():\n"
        "    for n in (2, 3):\n        yield {'x': np.zeros((n, 3, 4, 4), np.float32)}\n",
    )
    events = Watching()
    assert len(load_training(source, [IMAGE], events)) == 5
    assert events.told == [(2, "2 samples"), (3, "5 samples")]


AUGMENT = """
import torch
def load_data():
    return []
def augment(batch, generator):
    import beside  # found at the time of the call, too
    return {**batch, "x": batch["x"] + beside.SIZE * torch.rand(batch["x"].shape, generator=generator)}
"""


def test_a_scripts_own_augmentation(tmp_path: Path) -> None:
    source = script(tmp_path, AUGMENT)
    (tmp_path / "beside.py").write_text("SIZE = 4.0\n")
    own = augmentation(f"{source}:other", "auto")
    assert isinstance(own, ScriptAugmentation) and isinstance(augmentation(source, "script"), ScriptAugmentation)
    batch = {"x": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}
    made = own(batch, generator(3))
    expected = 4.0 * torch.rand((2, 3), generator=generator(3))
    assert torch.equal(made["x"], expected) and torch.equal(made["labels"], batch["labels"])
    assert not batch["x"].any()
    before = own.describe()
    (tmp_path / "load.py").write_text(AUGMENT + "# changed\n")
    again = augmentation(source)
    assert isinstance(again, ScriptAugmentation) and again.describe() != before


def test_augmentations_by_name(tmp_path: Path) -> None:
    assert augmentation(None, "crop_flip") is crop_flip
    assert augmentation(None) is augmentation("data.npz", "auto") is none
    plain = script(tmp_path, "def load_data():\n    return []\n")
    assert augmentation(plain, "auto") is none
    with pytest.raises(UsageError, match="'mixup': there are: none, flip, crop_flip, script, auto"):
        augmentation(plain, "mixup")
    with pytest.raises(UsageError, match=r"load\.py defines no augment\(\)"):
        augmentation(plain, "script")
    with pytest.raises(UsageError, match="no training data defines no"):
        augmentation(None, "script")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [batch]", "returned list; expected a dict of x"),
        ("return {}", "returned ; expected a dict of x"),
        (
            "return {'x': batch['x'][:, :1]}",
            r"made 'x' torch.float32 \(2, 1\); expected a tensor torch.float32 \(2, 3\)",
        ),
        ("return {'x': batch['x'].double()}", "made 'x' torch.float64"),
        ("return {'x': batch['x'].numpy()}", "made 'x' ndarray"),
        ("raise KeyError('size')", "raised KeyError: 'size'"),
    ],
)
def test_what_a_script_does_wrong_is_told(body: str, message: str, tmp_path: Path) -> None:
    own = augmentation(script(tmp_path, f"def augment(batch, generator):\n    {body}\n"), "script")
    with pytest.raises(InputError, match=message) as told:
        own({"x": torch.zeros(2, 3)}, generator(0))
    assert f"{tmp_path}/load.py:augment" in str(told.value) and "\n" not in str(told.value)
