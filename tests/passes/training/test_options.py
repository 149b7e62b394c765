from __future__ import annotations

import json
import math
from typing import Any

import pytest

from passes.training.options import TrainingOptions

BAD: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "epochs is 0 and batch 128; both must be at least 1"),
    ({"batch": -1}, "batch -1"),
    ({"epochs": 2.5}, r"epochs is 2\.5, must be a whole number"),
    ({"seed": True}, "seed is True"),
    ({"seed": -1}, "seed is -1, must not be negative"),
    ({"lr": 0.0}, r"lr is 0\.0, must be above 0"),
    ({"lr": math.inf}, "lr is inf"),
    ({"lr": math.nan}, "lr is nan"),
    ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
    ({"momentum": 1.0}, r"momentum is 1\.0, must be at least 0 and less than 1"),
    ({"label_smoothing": math.nan}, "label_smoothing is nan"),
    ({"held_out": 1.0}, "held_out is"),
    ({"ema": 1.0}, "ema is"),
    ({"warmup": 21.0}, r"warmup is 21\.0, must lie between 0 and the 20 epochs"),
    ({"clip_norm": 0.0}, "clip_norm is"),
    ({"milestones": (0.7, 0.5)}, r"milestones are \[0\.7, 0\.5\]"),
    ({"milestones": (0.5, 1.0)}, "milestones are"),
    ({"optimizer": "sdg"}, "optimizer is 'sdg'; there are: sgd, adam, adamw"),
    ({"schedule": "linear"}, "there are: cosine, step"),
    ({"precision": "fp16"}, "there are: auto, fp32, bf16"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=lambda value: str(value)[:30])
def test_what_no_run_can_have_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**changed)


def test_as_json_and_back() -> None:
    options = TrainingOptions(schedule="step", milestones=(0.25, 0.5), clip_norm=2.0, ema=0.99)
    assert TrainingOptions(**json.loads(json.dumps(options.as_dict()))) == options
    assert set(options.as_dict()) == set(TrainingOptions.names())


def test_cosine_after_a_linear_rise() -> None:
    options = TrainingOptions(epochs=10, lr=0.4, warmup=2.0)
    assert options.lr_at(0) == pytest.approx(0.4 * 0.0005)
    assert options.lr_at(1) == pytest.approx(0.2, rel=2e-3)
    assert options.lr_at(2) == pytest.approx(0.4)
    assert options.lr_at(6) == pytest.approx(0.2)  # half of the way down
    assert options.lr_at(10) == pytest.approx(0, abs=1e-12)
    rising, falling = [options.lr_at(e / 10) for e in range(20)], [options.lr_at(e / 10) for e in range(20, 101)]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert max(rising) <= 0.4


def test_a_tenth_at_each_milestone() -> None:
    options = TrainingOptions(epochs=8, lr=1.0, warmup=0, schedule="step", milestones=(0.5, 0.75))
    assert [options.lr_at(e) for e in (0, 3.99, 4, 5.9, 6, 7.9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
