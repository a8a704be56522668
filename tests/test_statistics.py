"""Intervals over seeds and over problems: values by hand, coverage, and what has no interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from zoo.statistics import clustered_interval, t_interval


def test_student_s_t_by_hand():
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302652730 / 3**0.5, 2 + 4.302652730 / 3**0.5))
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.t.interval(0.9, 6, values.mean(), stats.sem(values))
    assert t_interval(values, confidence=0.9) == pytest.approx(expected)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)


def test_too_few_have_no_interval():
    assert t_interval([]) is None
    assert t_interval([0.3]) is None
    assert clustered_interval([], []) is None
    assert clustered_interval([0.0, 1.0, 1.0], [7, 7, 7]) is None


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"confidence": 0.0}])
def test_what_is_no_confidence_is_refused(options):
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_interval([1.0, 2.0], **options)
    with pytest.raises(ValueError, match="between 0 and 1"):
        clustered_interval([1.0, 2.0], [0, 1], **options)


def test_misshaped_input_is_refused():
    with pytest.raises(ValueError, match="one cluster is needed for each value"):
        clustered_interval([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="one list"):
        t_interval([[1.0, 2.0]])


def test_one_row_a_problem_is_scipy_s_bootstrap():
    values = np.random.default_rng(1).random(60)
    found = clustered_interval(values, np.arange(60), resamples=20_000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0)
    assert found == pytest.approx(expected.confidence_interval, abs=2e-3)
    assert found == clustered_interval(values, np.arange(60) * 5 - 100, resamples=20_000)  # names are only names


def test_rows_of_one_problem_count_once():
    """Repeating every row changes nothing; calling the copies problems of their own would narrow the interval."""
    values = (np.random.default_rng(2).random(30) < 0.7).astype(float)
    once = clustered_interval(values, np.arange(30))
    assert clustered_interval(np.repeat(values, 40), np.repeat(np.arange(30), 40)) == pytest.approx(once)
    low, high = clustered_interval(np.repeat(values, 40), np.arange(1200))
    assert high - low < 0.3 * (once.high - once.low)


def test_larger_problems_weigh_more():
    values, clusters = np.array([1.0] * 90 + [0.0] * 10), np.array([0] * 90 + [1] * 10)
    assert clustered_interval(values, clusters) == pytest.approx((0.0, 1.0))
    assert clustered_interval(np.array([0.0, 1.0]), np.array([0, 1])) == pytest.approx((0.0, 1.0))


def test_always_right_is_no_proof():
    """0 of n and n of n have the exact interval of n trials, n being the problems and not the rows."""
    for n in (2, 15, 400):
        rows = np.repeat(np.arange(n), 3)
        right = stats.binomtest(n, n).proportion_ci(0.95)
        assert clustered_interval(np.ones(3 * n), rows) == pytest.approx((right.low, 1.0))
        assert clustered_interval(np.zeros(3 * n), rows) == pytest.approx((0.0, 1 - right.low))


def test_it_covers_the_truth():
    """Of 300 sets of 40 problems with 1 to 9 rows each and an effect of their own, about 95 % hold the mean."""
    random, held = np.random.default_rng(3), 0
    for _ in range(300):
        sizes = random.integers(1, 10, size=40)
        rows = np.repeat(np.arange(40), sizes)
        values = np.repeat(random.normal(size=40), sizes) + random.normal(size=len(rows))
        low, high = clustered_interval(values, rows, resamples=400)
        held += low <= 0 <= high
    assert 0.89 <= held / 300 <= 0.98


def test_memory_is_bounded(monkeypatch):
    """Drawn in pieces or at once: the same number of draws."""
    values = np.random.default_rng(4).random(500)
    whole = clustered_interval(values, np.arange(500))
    monkeypatch.setattr("zoo.statistics.intervals._DRAWN", 10_000)
    assert clustered_interval(values, np.arange(500)) == pytest.approx(whole)
