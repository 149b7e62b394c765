import numpy as np
import pytest
from numpy.typing import NDArray

from codegen.tune.statistics import noise_margin, ratio, summary


def busy(rng: np.random.Generator, seconds: float, blocks: int, calls: int) -> NDArray[np.float64]:
    """Calls of a program of ``seconds`` on a machine that does other things: every call is a little late, and for whole
    blocks at a time everything takes up to three times as long."""
    late = 1 + rng.exponential(0.02, (blocks, calls)) + (rng.random((blocks, calls)) < 0.2) * rng.exponential(1.0)
    return seconds * late


def pairs(rng: np.random.Generator, true_ratio: float, blocks: int = 20) -> tuple[NDArray[np.float64], ...]:
    drift = np.where(rng.random((blocks, 1)) < 0.3, rng.uniform(1, 3, (blocks, 1)), 1.0)  # of both of a pair
    return busy(rng, true_ratio, blocks, 30) * drift, busy(rng, 1.0, blocks, 30) * drift


def test_summary_is_minimum_lower_percentile_and_median() -> None:
    found = summary([3.0, 1.0, 2.0, 5.0, 4.0, 9.0, 8.0, 7.0, 6.0, 10.0, 11.0])
    assert (found.seconds, found.p10, found.median) == (1.0, 2.0, 6.0)  # ceil(11 / 10) = 2nd of 11, and the 6th
    assert summary([2.0]).p10 == 2.0


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [1.0, float("nan")], [float("inf")]])
def test_summary_refuses_what_is_no_time(samples: list[float]) -> None:
    with pytest.raises(ValueError):
        summary(samples)


@pytest.mark.parametrize("true_ratio", [0.5, 0.97, 1.0])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(true_ratio: float) -> None:
    rng = np.random.default_rng(1)
    found = [ratio(*pairs(rng, true_ratio), confidence=0.95) for _ in range(1000)]
    held = np.mean([r.low <= true_ratio <= r.high for r in found])
    # 20 pairs: P(5 or fewer of 20 on one side) = 0.0207, so 0.9586; three standard deviations of 1000 draws are 0.019.
    assert abs(held - 0.9586) < 0.02
    assert np.median([r.value for r in found]) == pytest.approx(true_ratio, rel=1e-3)


def test_the_mean_of_the_same_samples_is_far_off() -> None:
    """What the minimum is for: drift that hits one of a pair alone moves the mean and not the ratio of minima."""
    rng = np.random.default_rng(2)
    first, second = busy(rng, 1.0, 20, 30), busy(rng, 1.0, 20, 30)
    first[:, ::2] *= rng.uniform(1, 4, (20, 1))
    assert first.mean() / second.mean() > 1.4
    assert ratio(first, second, confidence=0.95).value == pytest.approx(1.0, rel=0.01)


def test_a_gain_is_one_where_the_whole_interval_is() -> None:
    exact = np.ones((20, 3))
    found = ratio(0.9 * exact, exact, 0.95)
    assert (found.value, found.low, found.high, found.gain, found.loss) == (0.9, 0.9, 0.9, True, False)
    assert found.margin == 0.0
    worse = ratio(exact, 0.9 * exact, 0.95)
    assert worse.loss and not worse.gain


def test_false_gains_are_as_rare_as_the_confidence_says() -> None:
    rng = np.random.default_rng(3)
    gains = np.mean([ratio(*pairs(rng, 1.0), confidence=0.95).gain for _ in range(2000)])
    # The true probability is 0.0207; three standard deviations of 2000 draws are 0.0096.
    assert gains < 0.0207 + 0.0096


def test_the_margin_is_what_a_gain_must_exceed() -> None:
    """A ratio with the margin's noise that is better than 1 - margin is a gain, and one that is worse is none."""
    rng = np.random.default_rng(4)
    first, second = pairs(rng, 1.0)
    noise = ratio(first, second, 0.95)
    for factor, gain in ((1 - 1e-9, True), (1 + 1e-9, False)):
        wanted = (1 - noise.margin) / noise.value * factor
        assert ratio(first * wanted, second, 0.95).gain is gain


def test_the_noise_margin_grows_with_the_noise_and_covers_it() -> None:
    rng = np.random.default_rng(5)

    def median_margin(noise: float) -> float:
        return float(np.median([noise_margin(1 + rng.exponential(noise, (40, 5)), 0.95) for _ in range(100)]))

    quiet, loud = median_margin(0.01), median_margin(0.1)
    assert 0 < quiet < 0.01 and 5 * quiet < loud
    assert noise_margin(np.ones((12, 2)), 0.95) == 0.0


def test_few_blocks_give_no_interval() -> None:
    # Five pairs: the widest interval holds 1 - 2 / 2^5 = 0.9375.
    with pytest.raises(ValueError, match="5 blocks are too few for an interval of 95%"):
        ratio(np.ones((5, 2)), np.ones((5, 2)), 0.95)
    assert ratio(np.ones((5, 2)), np.ones((5, 2)), 0.93).value == 1.0
    assert ratio(np.ones((6, 2)), np.ones((6, 2)), 0.95).value == 1.0
    with pytest.raises(ValueError, match="as many blocks"):
        ratio(np.ones((7, 2)), np.ones((6, 2)), 0.95)
    with pytest.raises(ValueError, match="confidence"):
        ratio(np.ones((7, 2)), np.ones((7, 2)), 1.0)
