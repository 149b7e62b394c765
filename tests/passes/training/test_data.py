"""Batches follow from seed, epoch and step alone; augmentations against their definition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.training.augment import Batch, crop_flip, flip, none
from passes.training.data import TrainingSet, generator


def numbered(count: int) -> TrainingSet:
    """Sample i is the number i, its label i mod 3."""
    return TrainingSet.of({"x": np.arange(count, dtype=np.float32)[:, None]}, np.arange(count) % 3)


def noisy(batch: Batch, draws: torch.Generator) -> Batch:
    return {**batch, "x": batch["x"] + torch.rand(batch["x"].shape, generator=draws) / 2}


def seen(batches: list[Batch]) -> list[list[float]]:
    return [[float(v) for v in batch["x"].flatten()] for batch in batches]


counts, sizes, seeds = st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32)


@given(counts, sizes, seeds, st.integers(0, 50))
def test_an_epoch_shows_every_sample_at_most_once(count: int, batch: int, seed: int, epoch: int) -> None:
    data = numbered(count)
    batches = list(data.epoch(epoch, batch, seed))
    assert len(batches) == data.steps(batch) == max(count // batch, 1)
    shown = [v for part in seen(batches) for v in part]
    assert len(shown) == len(set(shown)) == min(count // batch * batch or count, count)
    assert set(shown) <= set(range(count))
    for part in batches:
        assert torch.equal(part["labels"], part["x"].flatten().long() % 3)


@given(st.integers(4, 40), sizes, seeds, st.integers(0, 5), st.data())
def test_an_epoch_entered_anywhere_goes_on_alike(
    count: int, batch: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))  # no state outside has a part in it
    start = data.draw(st.integers(0, count // batch))
    whole = seen(list(numbered(count).epoch(epoch, batch, seed, noisy)))
    assert seen(list(numbered(count).epoch(epoch, batch, seed, noisy, start))) == whole[start:]


@given(st.integers(6, 40), st.integers(3, 12), st.integers(2, 3), seeds)
def test_processes_share_each_batch(count: int, batch: int, ranks: int, seed: int) -> None:
    whole = seen(list(numbered(count).epoch(0, batch, seed, noisy)))
    parts = [seen(list(numbered(count).epoch(0, batch, seed, noisy, 0, rank, ranks))) for rank in range(ranks)]
    for step, expected in enumerate(whole):
        shared = [part[step] for part in parts]
        assert sorted(v for part in shared for v in part) == sorted(expected)
        assert max(map(len, shared)) - min(map(len, shared)) <= 1


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(seen(list(numbered(30).epoch(e, 30, s)))[0]) for e in range(4) for s in range(3)}
    assert len(orders) == 12
    draws = [float(torch.rand(1, generator=generator(*key))) for key in [(0, 1), (1, 1), (1, 2), (0, 2), (0, 1)]]
    assert len(set(draws)) == 4 and draws[0] == draws[4]


@given(st.integers(2, 60), st.floats(0, 0.9), seeds)
def test_held_out_samples_are_never_trained_on(count: int, share: float, seed: int) -> None:
    expected = max(round(share * count), int(share > 0))
    if expected >= count:
        with pytest.raises(ValueError, match="leave none to train with"):
            numbered(count).split(share, seed)
        return
    kept, held = numbered(count).split(share, seed)
    both = [set(part.inputs["x"].flatten().tolist()) for part in (kept, held)]
    assert len(held) == expected and not both[0] & both[1] and both[0] | both[1] == set(range(count))
    again = numbered(count).split(share, seed)[1]
    assert torch.equal(again.inputs["x"], held.inputs["x"])
    assert held.labels is not None and torch.equal(held.labels, held.inputs["x"].flatten().long() % 3)


def test_all_samples_in_their_order() -> None:
    assert [v for part in seen(list(numbered(7).batches(3))) for v in part] == list(range(7))


def test_sets_that_are_none() -> None:
    x = np.zeros((4, 2), np.float32)
    for inputs, labels, message in [
        ({"x": x}, np.zeros(3), r"\[3, 4\] samples"),
        ({"x": x, "y": x[:2]}, None, r"\[2, 4\] samples"),
        ({}, None, "needs an input"),
        ({"x": x}, np.zeros((4, 2)), "one class a sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainingSet.of(inputs, labels)
    with pytest.raises(ValueError, match="a row of each"):
        TrainingSet({"x": torch.tensor(1.0)})


def test_the_digest_sees_names_types_and_values() -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    labels = np.arange(3)
    sets = [
        TrainingSet.of({"x": x}, labels), TrainingSet.of({"y": x}, labels), TrainingSet.of({"x": x}),
        TrainingSet.of({"x": x.reshape(3, 2, 1)}, labels), TrainingSet.of({"x": x.astype(np.float64)}, labels),
        TrainingSet.of({"x": x + (x == 3)}, labels), TrainingSet.of({"x": x}, labels[::-1]),
    ]  # fmt: skip
    assert len({one.digest() for one in sets}) == len(sets)
    assert sets[0].digest() == TrainingSet.of({"x": x.copy()}, labels).digest()


def test_a_read_only_array_is_copied() -> None:
    x = np.arange(4.0)[:, None]
    x.flags.writeable = False
    made = TrainingSet.of({"x": x}).inputs["x"]
    made += 1
    assert x.flatten().tolist() == [0, 1, 2, 3]


def pictures(count: int, height: int = 16, width: int = 24) -> Batch:
    x = torch.arange(count * 2 * height * width, dtype=torch.float32).reshape(count, 2, height, width) + 1
    return {"x": x, "vector": torch.arange(count, dtype=torch.float32)[:, None], "labels": torch.arange(count)}


def test_each_image_is_mirrored_whole_or_not_at_all() -> None:
    batch = pictures(200)
    made = flip(batch, generator(0))
    mirrored = 0
    for before, after in zip(batch["x"], made["x"], strict=True):
        expected = torch.tensor(before.numpy()[:, :, ::-1].copy())
        assert torch.equal(after, before) or torch.equal(after, expected)
        mirrored += int(torch.equal(after, expected))
    assert 70 <= mirrored <= 130  # five standard deviations of 200 fair coins
    assert made["vector"] is batch["vector"] and made["labels"] is batch["labels"]


def test_shifts_are_those_of_the_padded_image_and_all_alike_often() -> None:
    batch, height, width = pictures(900), 16, 24
    made = crop_flip(batch, generator(1))["x"]
    found: Counter[tuple[int, int, bool]] = Counter()
    for before, after in zip(batch["x"].numpy(), made.numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (3, 3)))
        candidates = {
            (top, left, mirrored): (crop[:, :, ::-1] if mirrored else crop)
            for top in range(5)
            for left in range(7)
            for crop in [padded[:, top : top + height, left : left + width]]
            for mirrored in (False, True)
        }
        matches = [key for key, candidate in candidates.items() if np.array_equal(candidate, after)]
        assert len(matches) == 1
        found[matches[0]] += 1
    for axis, values in ((0, 5), (1, 7), (2, 2)):
        marginal = Counter(key[axis] for key in found.elements())
        assert len(marginal) == values
        spread = 5 * (900 / values * (1 - 1 / values)) ** 0.5
        assert all(abs(count - 900 / values) < spread for count in marginal.values()), marginal


def test_the_generator_alone_decides() -> None:
    batch = pictures(20)
    torch.manual_seed(3)
    one = crop_flip(batch, generator(5))["x"]
    assert torch.equal(crop_flip(batch, generator(5))["x"], one)
    assert not torch.equal(crop_flip(batch, generator(6))["x"], one)
    assert none(batch, generator(0)) is batch
