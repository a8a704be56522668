"""Intervals of a mean: over seeds, and over test rows of which several may be one problem."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, stdtrit

RESAMPLES = 2000
_DRAWN = 4_000_000  # clusters drawn at a time, so that many of them need no more memory


class Interval(NamedTuple):
    """The interval of a mean, at a given confidence."""

    low: float
    high: float


def t_interval(values: ArrayLike, confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean of independent values, one a seed; None for fewer than two."""
    given = _values(values)
    _check(confidence)
    if len(given) < 2:
        return None
    mean, error = given.mean(), given.std(ddof=1) / len(given) ** 0.5
    reach = float(stdtrit(len(given) - 1, 0.5 + confidence / 2) * error)
    return Interval(float(mean) - reach, float(mean) + reach)


def clustered_interval(
    values: ArrayLike, clusters: ArrayLike, confidence: float = 0.95, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Bootstrap interval of the mean of values, by drawing whole clusters of them anew; None for a single cluster.

    The percentiles of the mean over `resamples` draws of as many clusters as there are, each with all its values. Where
    all values are 0 or all are 1, draws differ in nothing: a share that was never or always reached then has the exact
    binomial interval (Clopper and Pearson) of one trial a cluster.

    Args:
        values: (n,), such as whether each row was answered right.
        clusters: (n,) whole numbers; rows of one number are one problem.
        confidence: share of such intervals that hold the mean.
        resamples: draws.
        seed: of the draws: the same values give the same interval.
    """
    given, names = _values(values), np.asarray(clusters)
    _check(confidence)
    if names.shape != given.shape:
        raise ValueError(f"{given.shape} values and {names.shape} clusters: one cluster is needed for each value.")
    _, places = np.unique(names, return_inverse=True)
    sizes = np.bincount(places)
    n = len(sizes)
    if n < 2:
        return None
    tail = (1 - confidence) / 2
    if (given == given[0]).all() and given[0] in (0.0, 1.0):
        edge = float(betaincinv(n, 1, tail))
        return Interval(edge, 1.0) if given[0] else Interval(0.0, 1 - edge)
    sums = np.bincount(places, given)
    random, means = np.random.default_rng(seed), []
    for start in range(0, resamples, step := max(_DRAWN // n, 1)):
        drawn = random.integers(n, size=(min(step, resamples - start), n))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(low), float(high))


def _values(values: ArrayLike) -> NDArray[np.float64]:
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"Values come as one list, not as an array of shape {given.shape}.")
    return given


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} should be between 0 and 1.")


__all__ = ["Interval", "clustered_interval", "t_interval"]
