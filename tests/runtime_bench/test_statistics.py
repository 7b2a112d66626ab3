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


def test_one_round_has_no_interval_to_speak_of() -> None:
    found = statistics.ratio_interval([1.7])
    assert (found.value, found.low, found.high) == (1.7, 1.7, 1.7)
    assert f"{found:.2f}" == "1.70 (1.70-1.70)"


@given(st.lists(positive, min_size=3, max_size=40), st.sampled_from([0.8, 0.95]))
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
    found = statistics.shift([2.0, 4.0], [1.0, 2.0], limit=0.5)
    # Quotients 2, 4, 1, 2, so their median is 2: half as fast.
    assert found.slowdown == pytest.approx(1.0)
    # Of 6 ways to place two values among four, U = 0 needs one: with the limit 0.5 old is 1.33, 2.67, new 1, 2.
    assert found.p_beyond == pytest.approx(2 / 6)


@given(
    st.lists(positive, min_size=4, max_size=12, unique=True), st.lists(positive, min_size=4, max_size=12, unique=True)
)
def test_shift_interval_is_what_the_test_would_not_reject(old: list[float], new: list[float]) -> None:
    found = statistics.shift(old, new, limit=0.05)
    assert found.low <= found.slowdown <= found.high
    log_old, log_new = np.log(old), np.log(new)
    for outside in (math.log1p(found.low) - 1e-6, math.log1p(found.high) + 1e-6):
        p = scipy.stats.mannwhitneyu(log_new + outside, log_old, method="asymptotic", use_continuity=False).pvalue
        assert p <= 0.11  # at the very ends, where U has few values, the approximation rounds to the wider interval


def test_a_difference_that_is_not_there_is_seldom_seen() -> None:
    random = np.random.default_rng(1)
    beyond = within = 0
    for _ in range(600):
        old, new = np.exp(random.standard_t(2, (2, 10)) * 0.05)
        found = statistics.shift(old.tolist(), (new / 1.05).tolist(), limit=0.05)  # right at the limit
        beyond += found.p_beyond < 0.05
        within += found.p_within < 0.05
    assert beyond / 600 < 0.08
    assert within / 600 < 0.08


@pytest.mark.parametrize(("old", "new"), [(3, 3), (4, 4), (10, 1), (2, 9)])
def test_the_least_p_is_that_of_the_most_extreme_ranks(old: int, new: int) -> None:
    slow, fast = np.arange(1.0, new + 1), np.arange(100.0, 100.0 + old)
    found = statistics.shift(fast.tolist(), slow.tolist(), limit=0.05)
    assert found.p_beyond == pytest.approx(statistics.least_p(old, new))


def test_quantile_and_spread() -> None:
    assert statistics.quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert statistics.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
