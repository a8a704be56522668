"""Differences between configurations: paired by test problem, and by seed; corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zoo.statistics.crossed import Over, Spread, crossed, mean_squares
from zoo.statistics.intervals import Interval, binomial_interval, check_confidence, clustered_means
from zoo.statistics.scores import Array, Rows, Scores, by_problem

RESAMPLES = 10_000
"""Draws of the bootstrap of a difference: intervals of many differences are read far out."""


class Difference(NamedTuple):
    """The difference of two means.

    Attributes:
        mean: of the first less that of the second.
        interval: of the mean; None where nothing is repeated.
        p: how often so large a difference would be found if there were none; None without an interval.
        over: what the interval is over.
        paired: by what the two were paired.
        n_seeds: of the pair with fewer.
        n_problems: test problems shared, 0 where rows are unknown.
    """

    mean: float
    interval: Interval | None
    p: float | None
    over: Over
    paired: tuple[str, ...]
    n_seeds: int
    n_problems: int

    @property
    def method(self) -> str:
        """How the interval was found, in words."""
        if not self.over:
            return "no interval: one seed, and no test rows"
        by = f"paired by {' and '.join(self.paired)}" if self.paired else "not paired (Welch)"
        return f"{'bootstrap' if self.over == 'problems' else 't'} over {self.over}, {by}"


def difference(one: Scores, other: Scores, confidence: float = 0.95) -> Difference:
    """How much more the first scored than the second.

    Seeds are paired where both have the same ones, else the seeds of both vary on their own (Welch). Problems are
    paired where both were scored on the same rows. With one seed, problems are drawn anew, each with all its rows: such
    an interval says nothing about other seeds.

    Args:
        one, other: figures of the two.
        confidence: share of such intervals that hold the difference.
    """
    check_confidence(confidence)
    mean = float(one.figures.mean() - other.figures.mean())
    pair = _same_rows(one, other)
    n_seeds = min(len(one.seeds), len(other.seeds))
    n_problems = 0 if pair is None else one.n_problems
    same_seeds = set(one.seeds) == set(other.seeds)
    by_row: tuple[str, ...] = ("problem",) if pair else ()
    paired: tuple[str, ...]
    if n_seeds < 2:
        if pair is None:
            return Difference(mean, None, None, "", (), n_seeds, 0)
        gap = Rows((pair[0].values.mean(0) - pair[1].values.mean(0))[None], pair[0].problems)
        interval, p = _bootstrap(gap, mean, confidence)
        paired = ("seed", "problem") if same_seeds else ("problem",)
        return Difference(mean, interval, p, "problems", paired, n_seeds, n_problems)
    if same_seeds:
        ordered = other.chosen(one.seeds)
        pair = _same_rows(one, ordered)
        if pair is None:
            spread = _over_seeds(one.figures - ordered.figures)
        else:
            spread = crossed(by_problem(pair[0]) - by_problem(pair[1]))
        paired = ("seed", *by_row)
    else:
        spread, paired = _welch(one, other, pair), by_row
    over: Over = "seeds and problems" if pair else "seeds"
    # Where every problem and seed differs by the same, Student's t has no spread: the test of signs, the pairs being n.
    p = spread.p_value(mean) if spread.error or not mean else min(1.0, 2.0 ** (1 - (n_problems or n_seeds)))
    interval = spread.interval(mean, confidence)
    if pair and not spread.error and not mean and _is_share(pair):
        # No answer differs, which is no proof: at most so many of n problems would.
        most = binomial_interval(0, n_problems, confidence).high
        interval = Interval(-most, most)
    return Difference(mean, interval, p, over, paired, n_seeds, n_problems)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979): below a level a as often as any is by luck with probability a.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is smaller than one before it or above 1.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def _same_rows(one: Scores, other: Scores) -> tuple[Rows, Rows] | None:
    """The rows of both where they are the same ones, of two problems or more."""
    if one.rows is None or other.rows is None or one.n_problems < 2:
        return None
    return (one.rows, other.rows) if np.array_equal(one.rows.problems, other.rows.problems) else None


def _is_share(pair: tuple[Rows, Rows]) -> bool:
    return all(((rows.values >= 0) & (rows.values <= 1)).all() for rows in pair)


def _over_seeds(figures: Array) -> Spread:
    return Spread(float(figures.std(ddof=1)) / math.sqrt(len(figures)), len(figures) - 1)


def _welch(one: Scores, other: Scores, pair: tuple[Rows, Rows] | None) -> Spread:
    """The seeds of both on their own; what the shared problems add to that, where there are any."""
    variances, problems = [], 0.0
    if pair is None:
        variances = [float(s.figures.var(ddof=1)) / len(s.seeds) for s in (one, other)]
    else:
        tables = [by_problem(rows) for rows in pair]
        n = tables[0].shape[1]
        squares = [mean_squares(table) for table in tables]
        cells = [len(table) * n for table in tables]
        variances = [s.seeds / k for s, k in zip(squares, cells, strict=True)]
        rest = sum(s.rest / k for s, k in zip(squares, cells, strict=True))
        problems = max(float((tables[0].mean(0) - tables[1].mean(0)).var(ddof=1)) / n - rest, 0.0)
    own = sum(v**2 / (len(s.seeds) - 1) for v, s in zip(variances, (one, other), strict=True))
    whole = sum(variances) + problems
    return Spread(math.sqrt(whole), whole**2 / own if own else math.inf)


def _bootstrap(gap: Rows, mean: float, confidence: float) -> tuple[Interval, float]:
    """Percentiles of the mean over problems drawn anew, and twice the share of draws on the other side of 0."""
    _, places = np.unique(gap.problems, return_inverse=True)
    drawn = clustered_means(np.bincount(places, gap.values[0]), np.bincount(places), resamples=RESAMPLES)
    drawn += mean - float(gap.values.mean())
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Interval(float(low), float(high)), min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
