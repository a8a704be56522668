"""What one configuration scored: a figure of each seed, and, where they are known, the score of each test row."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Rows(NamedTuple):
    """Scores of test rows that all seeds share.

    Attributes:
        values: (S, n), the score of each row under each seed.
        problems: (n,) whole numbers; rows of one number are one problem up to the task's symmetry.
    """

    values: Array
    problems: NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Figures of S seeds, in their order.

    Attributes:
        seeds: of each figure; distinct.
        figures: (S,), such as test accuracies.
        rows: scores of the test rows behind the figures; None where they are unknown, or differ from seed to seed.

    Raises:
        ValueError: shapes that do not fit, or a seed that is there twice.
    """

    seeds: Sequence[Hashable]
    figures: Array
    rows: Rows | None = None

    def __post_init__(self) -> None:
        n = len(self.seeds)
        if self.figures.shape != (n,) or len(set(self.seeds)) < n:
            raise ValueError(f"{n} seeds and figures of shape {self.figures.shape}: one figure belongs to each seed.")
        if self.rows is not None and self.rows.values.shape != (n, len(self.rows.problems)):
            raise ValueError(f"Scores of rows of shape {self.rows.values.shape}: expected one a seed and row.")

    @property
    def n_problems(self) -> int:
        """How many test problems differ; 0 where rows are unknown."""
        return 0 if self.rows is None else len(np.unique(self.rows.problems))

    def chosen(self, seeds: Sequence[Hashable]) -> Scores:
        """The scores of some of the seeds, in the order given."""
        at = [list(self.seeds).index(seed) for seed in seeds]
        rows = None if self.rows is None else Rows(self.rows.values[at], self.rows.problems)
        return Scores(list(seeds), self.figures[at], rows)


def by_problem(rows: Rows) -> Array:
    """(S, C) scores of each of C problems, whose mean over problems is the mean over rows.

    Of a problem with as many rows as others: the mean of its rows. Otherwise the mean of all rows and what the rows of
    this problem add to or take from it, so that larger problems weigh more, as they do in the mean.
    """
    _, places = np.unique(rows.problems, return_inverse=True)
    n_problems = int(places.max()) + 1
    means = rows.values.mean(1, keepdims=True)
    away = np.stack([np.bincount(places, of_seed, n_problems) for of_seed in rows.values - means])
    return means + away * n_problems / len(places)
