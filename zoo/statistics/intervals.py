"""Intervals of a mean: Student's t over seeds, and a bootstrap over test rows of which several may be one problem."""

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
    check_confidence(confidence)
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
    check_confidence(confidence)
    if names.shape != given.shape:
        raise ValueError(f"{given.shape} values and {names.shape} clusters: one cluster is needed for each value.")
    _, places = np.unique(names, return_inverse=True)
    sizes = np.bincount(places)
    n = len(sizes)
    if n < 2:
        return None
    tail = (1 - confidence) / 2
    if (given == given[0]).all() and given[0] in (0.0, 1.0):
        return binomial_interval(n * given[0], n, confidence)
    means = clustered_means(np.bincount(places, given), sizes, resamples=resamples, seed=seed)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def clustered_means(sums: ArrayLike, sizes: ArrayLike, *, resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """(resamples,) means of values whose clusters are drawn anew.

    Args:
        sums: (n,) sum of the values of each cluster.
        sizes: (n,) their number.
        resamples: draws.
        seed: of the draws.
    """
    sums, sizes = np.asarray(sums, dtype=np.float64), np.asarray(sizes)
    n = len(sums)
    random, means = np.random.default_rng(seed), []
    for start in range(0, resamples, step := max(_DRAWN // n, 1)):
        drawn = random.integers(n, size=(min(step, resamples - start), n))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(means)


def binomial_interval(right: float, n: float, confidence: float = 0.95) -> Interval:
    """Exact interval (Clopper and Pearson) of a share, from n trials of which `right` succeeded.

    `right` may be no whole number: the sum of n scores from 0 to 1 varies at most as much as that of n such trials with
    the same mean, so that the interval is wide enough for it too.

    Args:
        right: from 0 to n.
        n: above 0.
        confidence: share of such intervals that hold the true share.
    """
    check_confidence(confidence)
    tail = (1 - confidence) / 2
    low = float(betaincinv(right, n - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, n - right, 1 - tail)) if right < n else 1.0
    return Interval(low, high)


def _values(values: ArrayLike) -> NDArray[np.float64]:
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"Values come as one list, not as an array of shape {given.shape}.")
    return given


def check_confidence(confidence: float) -> None:
    """Refuse what is no confidence.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} should be between 0 and 1.")
