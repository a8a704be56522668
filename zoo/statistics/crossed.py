"""The interval of a mean over seeds and over test problems, where every seed meets the same problems.

Seeds and problems are crossed: the figure of a seed rests on which problems were drawn, and all seeds share that draw.
Three seeds are too few for a bootstrap of them, so that the variance of the mean comes from the mean squares of the
two-way table of seeds and problems,

    variance = (MS_seeds + max(MS_problems - MS_rest, 0)) / (n_seeds n_problems),

and the interval is Student's t with the degrees of freedom

    (MS_seeds + max(MS_problems - MS_rest, 0))^2 / (MS_seeds^2 / (n_seeds - 1)).

Where problems do not matter, that is Student's t interval over seeds; where seeds do not, the normal interval over
problems. It is the analysis of studies in which several readers judge the same cases (Hillis 2007, "A comparison of
denominator degrees of freedom methods for multiple observer ROC analysis", Statistics in Medicine 26).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from zoo.statistics.intervals import Interval, binomial_interval, check_confidence, clustered_interval, t_interval
from zoo.statistics.scores import Array, Scores, by_problem

Over = Literal["seeds and problems", "seeds", "problems", ""]
"""What an interval is over: empty where there is none."""


class Estimate(NamedTuple):
    """A mean, and its interval over what varies; None where nothing does."""

    mean: float
    interval: Interval | None
    over: Over


class Spread(NamedTuple):
    """The standard error of a mean and its degrees of freedom."""

    error: float
    freedom: float

    def interval(self, mean: float, confidence: float) -> Interval:
        """Student's t interval round a mean."""
        reach = quantile(0.5 + confidence / 2, self.freedom) * self.error
        return Interval(mean - reach, mean + reach)

    def p_value(self, mean: float) -> float:
        """How often a mean of 0 would be found this far from 0, on either side; 1 where there is no spread."""
        if self.error == 0:
            return 1.0
        return 2 * float(stdtr(min(self.freedom, 1e9), -abs(mean) / self.error))


def quantile(share: float, freedom: float) -> float:
    """Of Student's t distribution; of the normal one for infinite degrees of freedom."""
    return float(stdtrit(min(freedom, 1e9), share))


def estimate(scores: Scores, confidence: float = 0.95, *, share: bool = True, positive: bool = False) -> Estimate:
    """The mean figure over seeds and its interval.

    Two seeds or more on known test rows: the interval over both. Two seeds or more: Student's t over them. One seed:
    the bootstrap over problems, a problem being drawn with all its rows. One seed and no rows: no interval.

    Args:
        scores: of one configuration.
        confidence: share of such intervals that hold the mean.
        share: whether figures are shares, which end at 0 and at 1.
        positive: whether figures are errors, which end at 0.
    """
    check_confidence(confidence)
    mean = float(scores.figures.mean())
    rows = scores.rows if scores.n_problems > 1 else None
    interval: Interval | None
    if rows is not None and share and rows.values.min() == rows.values.max() and mean in (0.0, 1.0):
        # Nothing varies, which is no proof: n of n problems right.
        return Estimate(mean, binomial_interval(mean * scores.n_problems, scores.n_problems, confidence), "problems")
    if len(scores.seeds) > 1 and rows is not None:
        interval, over = crossed(by_problem(rows)).interval(mean, confidence), "seeds and problems"
    elif len(scores.seeds) > 1:
        interval, over = t_interval(scores.figures, confidence), "seeds"
    elif rows is not None:
        found = clustered_interval(rows.values[0], rows.problems, confidence)
        away = mean - float(rows.values.mean())  # a figure that weighs rows otherwise than each alike
        interval, over = found and Interval(found.low + away, found.high + away), "problems"
    else:
        interval, over = None, ""
    if interval is not None and (share or positive):
        interval = Interval(max(interval.low, 0.0), min(interval.high, 1.0) if share else interval.high)
    return Estimate(mean, interval, over)  # type: ignore[arg-type]


class MeanSquares(NamedTuple):
    """Of a table of seeds and problems: of the means of seeds, of the means of problems, and of what remains."""

    seeds: float
    problems: float
    rest: float


def mean_squares(table: Array) -> MeanSquares:
    """Of an (S, C) table of at least two seeds and two problems."""
    n_seeds, n_problems = table.shape
    mean, of_seed, of_problem = table.mean(), table.mean(1), table.mean(0)
    rest = table - of_seed[:, None] - of_problem + mean
    return MeanSquares(
        n_problems * float(np.square(of_seed - mean).sum()) / (n_seeds - 1),
        n_seeds * float(np.square(of_problem - mean).sum()) / (n_problems - 1),
        float(np.square(rest).sum()) / ((n_seeds - 1) * (n_problems - 1)),
    )


def crossed(table: Array) -> Spread:
    """The spread of the mean of an (S, C) table over seeds and problems both, of at least two each."""
    n_seeds, n_problems = table.shape
    squares = mean_squares(table)
    both = squares.seeds + max(squares.problems - squares.rest, 0.0)
    freedom = both**2 / (squares.seeds**2 / (n_seeds - 1)) if squares.seeds else math.inf
    return Spread(math.sqrt(both / (n_seeds * n_problems)), freedom)
