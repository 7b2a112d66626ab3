"""The statistics against known distributions, hand-worked samples and scipy's own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from runtime_bench import statistics

positive = st.floats(0.1, 10, allow_nan=False)


def test_ratios_say_how_much_better_the_sparse_side_is() -> None:
    assert statistics.ratios([10, 12], [5, 3], lower_is_better=True) == [2, 4]
    assert statistics.ratios([10, 12], [5, 3], lower_is_better=False) == [0.5, 0.25]
    with pytest.raises(ValueError, match="shorter"):
        statistics.ratios([1, 2], [1], lower_is_better=True)


def test_few_rounds_say_how_little_they_show() -> None:
    assert f"{statistics.ratio_interval([1.7]):.2f}" == "1.70 (one round)"
    found = statistics.ratio_interval([1.7, 1.9, 1.8])
    assert (found.low, found.value, found.high, found.confidence) == (1.7, 1.8, 1.9, 0.75)
    assert f"{found:.2f}" == "1.80 (1.70-1.90, 75% sure)"
    assert f"{found:.2fx}" == "1.80x (1.70-1.90, 75% sure)"
    assert f"{statistics.ratio_interval([1.7] * 6):.2f}" == "1.70 (1.70-1.70)"


@pytest.mark.parametrize("rounds", [2, 3, 4, 5])
def test_the_range_of_few_rounds_encloses_the_truth_as_often_as_it_says(rounds: int) -> None:
    random = np.random.default_rng(0)
    found = [statistics.ratio_interval(np.exp(random.normal(0, 0.1, rounds)).tolist()) for _ in range(2000)]
    hits = sum(interval.low <= 1 <= interval.high for interval in found) / len(found)
    assert hits == pytest.approx(found[0].confidence, abs=0.04)


@given(st.lists(positive, min_size=6, max_size=40), st.sampled_from([0.8, 0.95]))
def test_the_interval_is_scipys_percentile_bootstrap(values: list[float], confidence: float) -> None:
    found = statistics.ratio_interval(values, confidence)
    theirs = scipy.stats.bootstrap(
        (values,), np.median, method="percentile", confidence_level=confidence, n_resamples=4000, rng=1
    ).confidence_interval
    assert found.low <= found.value <= found.high
    # Both draw resamples; a bound is an order statistic (or a mean of two), so it may fall on a neighbour.
    ordered = sorted(values)
    neighbours = sorted({*ordered, *((a + b) / 2 for a, b in itertools.pairwise(ordered))})
    for ours, other in ((found.low, theirs.low), (found.high, theirs.high)):
        between = [value for value in neighbours if min(ours, other) < value < max(ours, other)]
        assert len(between) <= 2


@pytest.mark.parametrize("rounds", [9, 20])
def test_the_interval_encloses_the_truth_as_often_as_it_says(rounds: int) -> None:
    random = np.random.default_rng(0)
    truth, experiments = 1.5, 400
    hits = 0
    for _ in range(experiments):
        found = statistics.ratio_interval((truth * np.exp(random.normal(0, 0.1, rounds))).tolist())
        hits += found.low <= truth <= found.high
    # The percentile bootstrap of a median is known to fall a little short for few rounds.
    assert hits / experiments >= 0.90


def test_shift_by_hand() -> None:
    found = statistics.Shift([2.0, 4.0], [1.0, 2.0])
    # Quotients 2, 4, 1, 2, so their median is 2: half as fast.
    assert found.slowdown == pytest.approx(1.0)
    # One of them is 1.5 or less. Of the 6 ways to place two values among four, U is 0 in one and 1 in another.
    assert found.p_beyond(0.5) == pytest.approx(2 / 6)
    assert found.p_within(0.5) == pytest.approx(5 / 6)  # three are 1.5 or more; U is 4 in one way only
    # U <= 0 has 1/6, U <= 1 has 2/6: at an error of a fifth the bounds are the ends, at a half the next ones.
    assert [found.low(0.2), found.high(0.2)] == pytest.approx([0.0, 3.0])
    assert [found.low(0.5), found.high(0.5)] == pytest.approx([1.0, 1.0])
    assert (found.low(0.1), found.high(0.1)) == (-1, math.inf)


samples = st.lists(positive, min_size=1, max_size=12, unique=True)


@given(samples, samples, st.sampled_from([0.0, 0.05, 0.5]))
def test_shift_is_scipys_exact_test(old: list[float], new: list[float], limit: float) -> None:
    found = statistics.Shift(old, new)
    for alternative, p in (("greater", found.p_within(limit)), ("less", found.p_beyond(limit))):
        theirs = scipy.stats.mannwhitneyu(
            np.log(new), np.log(old) - math.log1p(limit), alternative=alternative, method="exact"
        ).pvalue
        assert p == pytest.approx(theirs, abs=1e-9) or p > theirs  # of ties, which scipy's exact test does not know


@given(samples, samples, st.floats(-0.5, 2), st.floats(0.001, 0.4))
def test_bounds_are_on_the_side_of_a_limit_that_the_tests_say(
    old: list[float], new: list[float], limit: float, error: float
) -> None:
    found = statistics.Shift(old, new)
    assert (found.high(error) < limit) == (found.p_within(limit) < error)
    assert (found.low(error) > limit) == (found.p_beyond(limit) < error)
    assert found.low(error) <= found.slowdown + 1e-12
    assert found.slowdown - 1e-12 <= found.high(error)


def test_a_difference_that_is_not_there_is_seldom_seen() -> None:
    random = np.random.default_rng(1)
    beyond = within = 0
    for _ in range(600):
        old, new = np.exp(random.standard_t(2, (2, 10)) * 0.05)
        found = statistics.Shift(old.tolist(), (new / 1.05).tolist())  # right at the limit
        beyond += found.p_beyond(0.05) < 0.05
        within += found.p_within(0.05) < 0.05
    assert beyond / 600 < 0.08
    assert within / 600 < 0.08


@pytest.mark.parametrize(("old", "new"), [(3, 3), (4, 4), (10, 1), (2, 9), (60, 50)])
def test_the_least_p_is_that_of_the_most_extreme_ranks(old: int, new: int) -> None:
    slow, fast = np.arange(1.0, new + 1), np.arange(100.0, 100.0 + old)
    found = statistics.Shift(fast.tolist(), slow.tolist())
    assert found.p_beyond(0.05) == pytest.approx(statistics.least_p(old, new), abs=1e-12)
    assert found.p_within(0.05) == pytest.approx(1)


def test_quantile_and_spread() -> None:
    assert statistics.quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert statistics.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
