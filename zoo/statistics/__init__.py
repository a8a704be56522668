"""Intervals of means and of differences, over seeds and over test problems; docs/statistics.md explains each."""

from zoo.statistics.crossed import Estimate, estimate
from zoo.statistics.differences import Difference, difference, holm
from zoo.statistics.intervals import RESAMPLES, Interval, binomial_interval, clustered_interval, t_interval
from zoo.statistics.scores import Scores

__all__ = [
    "RESAMPLES",
    "Difference",
    "Estimate",
    "Interval",
    "Scores",
    "binomial_interval",
    "clustered_interval",
    "difference",
    "estimate",
    "holm",
    "t_interval",
]
