import pytest

from codegen.budget import Budget
from passes.core.cost import Cost
from passes.errors import UsageError

BASELINE = Cost(latency=2000.0, unit="cycles", energy_pj=500.0, macs=40, params=7, size_bytes=28)


@pytest.mark.parametrize(
    ("metric", "text", "value", "unit"),
    [
        ("latency", "2.5ms", 0.0025, "s"),
        ("latency", "300us", 0.0003, "s"),
        ("latency", "300 µs", 0.0003, "s"),
        ("latency", "120000cycles", 120000.0, "cycles"),
        ("latency", "1.2Mcycles", 1.2e6, "cycles"),
        ("energy", "1.5mJ", 1.5e9, "pJ"),
        ("energy", "20pJ", 20.0, "pJ"),
        ("macs", "40M", 4e7, "MACs"),
        ("macs", "123456", 123456.0, "MACs"),
        ("params", "200k", 2e5, "params"),
        ("size", "1.2MiB", 1.2 * 1024 * 1024, "B"),
        ("size", "1e3B", 1000.0, "B"),
    ],
)
def test_absolute_budgets_are_read_in_canonical_units(metric: str, text: str, value: float, unit: str) -> None:
    budget = Budget.parse(metric, text)
    assert (budget.metric, budget.unit, budget.relative) == (metric, unit, False)
    assert budget.value == pytest.approx(value, rel=1e-15, abs=0)


def test_a_percentage_is_a_fraction_of_the_baseline() -> None:
    for metric, baseline in [("latency", 2000), ("energy", 500), ("macs", 40), ("params", 7), ("size", 28)]:
        assert Budget.parse(metric, "60%").limit(BASELINE) == pytest.approx(0.6 * baseline, rel=1e-15, abs=0)


def test_seconds_become_cycles_by_the_clock_and_back() -> None:
    # 2 us at 500 MHz are 1000 cycles.
    assert Budget.parse("latency", "2us").limit(BASELINE, clock_hz=500e6) == pytest.approx(1000.0, rel=1e-15, abs=0)
    seconds = Cost(latency=1.0, unit="s")
    assert Budget.parse("latency", "1000cycles").limit(seconds, 500e6) == pytest.approx(2e-6, rel=1e-15, abs=0)


def test_seconds_without_a_clock_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^--latency is given in s, but the target counts cycles and has no clock$"):
        Budget.parse("latency", "2us").limit(BASELINE)


@pytest.mark.parametrize(
    ("metric", "text", "line"),
    [
        ("latency", "5", "--latency '5' has no unit; write 60%, 2.5ms, 300us or 120000cycles"),
        ("latency", "5mJ", "--latency '5mJ' has the unknown unit 'mJ'; write 60%, 2.5ms, 300us or 120000cycles"),
        ("latency", "fast", "--latency 'fast' is no budget; write 60%, 2.5ms, 300us or 120000cycles"),
        ("latency", "-3ms", "--latency '-3ms' is no budget; write 60%, 2.5ms, 300us or 120000cycles"),
        ("latency", "0%", "--latency '0%': a budget is a finite number above zero"),
        ("energy", "1e999pJ", "--energy '1e999pJ': a budget is a finite number above zero"),
        ("macs", "40m", "--macs '40m' has the unknown unit 'm'; write 60%, 40M or 1.2G"),
        ("params", "", "--params '' is no budget; write 60%, 200k or 1.5M"),
        ("size", "3", "--size '3' has no unit; write 60%, 800KiB or 1.2MiB"),
        ("speed", "3", "there is no budget on 'speed'; budgets: latency, energy, macs, params, size"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(metric: str, text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(metric, text)
    assert str(caught.value) == line
