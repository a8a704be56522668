"""Means over seeds and problems, and paired differences: limits, other people's tests, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from zoo.statistics import (
    Interval,
    Scores,
    binomial_interval,
    clustered_interval,
    difference,
    estimate,
    holm,
    t_interval,
)
from zoo.statistics.scores import Rows, by_problem


def scores(values, problems=None, seeds=None):
    """Scores whose figures are the means of the rows."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    problems = np.arange(values.shape[1]) if problems is None else np.asarray(problems)
    return Scores(list(range(len(values))) if seeds is None else seeds, values.mean(1), Rows(values, problems))


def figures(values, seeds=None):
    values = np.asarray(values, dtype=float)
    return Scores(list(range(len(values))) if seeds is None else seeds, values)


def test_problems_that_do_not_matter_leave_student_s_t_over_seeds():
    values = np.array([0.2, 0.5, 0.6])
    found = estimate(scores(np.repeat(values[:, None], 50, 1)), share=False)
    assert found.over == "seeds and problems"
    assert found.interval == pytest.approx(t_interval(values))
    assert estimate(figures(values), share=False) == (values.mean(), t_interval(values), "seeds")


def test_seeds_that_do_not_matter_leave_the_interval_over_problems():
    row = (np.random.default_rng(0).random(400) < 0.4).astype(float)
    found = estimate(scores([row, row, row]))
    reach = 1.959964 * row.std(ddof=1) / 20
    assert found.interval == pytest.approx((row.mean() - reach, row.mean() + reach), abs=1e-6)


def test_one_seed_has_the_bootstrap_over_problems():
    row, problems = np.random.default_rng(1).random(60), np.repeat(np.arange(20), 3)
    found = estimate(scores([row], problems))
    assert found.over == "problems"
    assert found.interval == pytest.approx(clustered_interval(row, problems))
    weighed = Scores([0], np.array([row.mean() + 0.01]), Rows(row[None], problems))  # rows that weigh differently
    assert estimate(weighed).interval == pytest.approx([edge + 0.01 for edge in found.interval])
    assert estimate(figures([0.5])) == (0.5, None, "")


def test_always_right_is_no_proof():
    found = estimate(scores(np.ones((3, 90)), np.repeat(np.arange(30), 3)))
    assert found == (1.0, pytest.approx((stats.binomtest(30, 30).proportion_ci().low, 1.0)), "problems")


def test_a_share_ends_at_0_and_at_1_and_a_loss_does_not():
    assert estimate(figures([0.0, 0.9])).interval == Interval(0.0, 1.0)
    low, high = estimate(figures([0.0, 0.9]), share=False).interval
    assert low < 0
    assert high > 1


def test_the_exact_binomial_interval_is_scipy_s():
    for right, n in ((0, 7), (3, 7), (7, 7), (120, 400)):
        assert binomial_interval(right, n) == pytest.approx(stats.binomtest(right, n).proportion_ci(0.95))


def test_rows_of_one_problem_count_once():
    values = np.random.default_rng(2).random((3, 30))
    once = estimate(scores(values)).interval
    assert estimate(scores(np.repeat(values, 5, 1), np.repeat(np.arange(30), 5))).interval == pytest.approx(once)


def test_unequal_problems_keep_the_mean_of_rows():
    values, problems = np.random.default_rng(3).random((2, 50)), np.repeat(np.arange(5), [1, 2, 7, 20, 20])
    assert by_problem(Rows(values, problems)).mean(1) == pytest.approx(values.mean(1))


def test_pairs_by_seed_are_scipy_s_paired_test():
    one, other = np.random.default_rng(4).random((2, 5))
    found, theirs = difference(figures(one), figures(other)), stats.ttest_rel(one, other)
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.interval == pytest.approx(theirs.confidence_interval())
    assert found.method == "t over seeds, paired by seed"
    turned = Scores([4, 3, 2, 1, 0], other[::-1].copy())  # the order of seeds is no matter
    assert difference(figures(one), turned).p == pytest.approx(found.p)


def test_other_seeds_are_welch_s_test():
    random = np.random.default_rng(5)
    one, other = random.random(4), random.normal(size=6)
    found = difference(figures(one), figures(other, seeds=list("abcdef")))
    theirs = stats.ttest_ind(one, other, equal_var=False)
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.interval == pytest.approx(theirs.confidence_interval())
    assert found.method == "t over seeds, not paired (Welch)"


def test_one_seed_is_paired_by_problem():
    random = np.random.default_rng(6)
    hard = random.random(200)
    one, other = (random.random((1, 200)) < hard + 0.08), (random.random((1, 200)) < hard)
    found = difference(scores(one), scores(other))
    alone = stats.ttest_rel(one[0].astype(float), other[0].astype(float))
    assert found.method == "bootstrap over problems, paired by seed and problem"
    assert found.p == pytest.approx(alone.pvalue, abs=0.02)
    assert found.interval == pytest.approx(alone.confidence_interval(), abs=0.01)
    assert difference(scores(one), scores(one)).p == 1


def test_where_nothing_is_repeated_there_is_no_interval():
    found = difference(figures([0.4]), figures([0.9]))
    assert found[:4] == (pytest.approx(-0.5), None, None, "")


def test_a_difference_without_spread_is_the_test_of_signs():
    found = difference(scores(np.ones((2, 6))), scores(np.zeros((2, 6))))
    assert found.p == pytest.approx(stats.binomtest(6, 6).pvalue)
    assert difference(scores(np.ones((2, 6))), scores(np.ones((2, 6)))).p == 1


def test_other_rows_are_not_paired():
    values = np.random.default_rng(7).random((3, 8))
    found = difference(scores(values), scores(values[:, :6]))
    assert found.paired == ("seed",)
    assert found.n_problems == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_errs_as_often_as_said():
    """Of 2,000 sets of 8 true nulls, about 5 % have a value below 0.05; without correction about a third have."""
    drawn = np.random.default_rng(8).random((2000, 8))
    wrong = np.mean([min(holm(list(row))) < 0.05 for row in drawn])
    assert 0.035 < wrong < 0.065
    assert (drawn.min(1) < 0.05).mean() > 0.3


def drawn(random, n_seeds, *, seed_effect, problem_effect, n_problems=40, mean=0.0):
    """A table of seeds and problems that share nothing but their effects."""
    return (
        mean
        + seed_effect * random.normal(size=(n_seeds, 1))
        + problem_effect * random.normal(size=n_problems)
        + random.normal(size=(n_seeds, n_problems))
    )


@pytest.mark.parametrize(("seed_effect", "problem_effect"), [(1.0, 0.0), (0.0, 1.0), (0.3, 1.0), (0.0, 0.0)])
def test_it_covers_the_truth_over_seeds_and_problems(seed_effect, problem_effect):
    """Of 400 experiments with 3 seeds, about 95 % hold the mean, wherever the variation comes from."""
    random, held = np.random.default_rng(9), 0
    for _ in range(400):
        table = drawn(random, 3, seed_effect=seed_effect, problem_effect=problem_effect)
        low, high = estimate(scores(table), share=False).interval
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.99


@pytest.mark.parametrize("same_seeds", [True, False])
def test_differences_cover_the_truth(same_seeds):
    """The effect of a problem on both models is no part of their difference; that of seeds is."""
    random, held = np.random.default_rng(10), 0
    for _ in range(400):
        problems = 2 * random.normal(size=40)
        one, other = (drawn(random, n, seed_effect=0.5, problem_effect=0.5) + problems for n in (3, 3))
        seeds = [0, 1, 2] if same_seeds else [7, 8, 9]
        found = difference(scores(one), scores(other, seeds=seeds))
        held += found.interval.low <= 0 <= found.interval.high
        assert found.paired == (("seed", "problem") if same_seeds else ("problem",))
    assert 0.92 <= held / 400 <= 0.99


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one figure belongs to each seed"):
        Scores([0, 0], np.zeros(2))
    with pytest.raises(ValueError, match="one a seed and row"):
        Scores([0], np.zeros(1), Rows(np.zeros((2, 3)), np.arange(3)))
