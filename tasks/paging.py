"""Rows that are dear to make, made once: kept in pages, so that an epoch or an evaluation comes back for nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from zoo.tasks import random
from zoo.tasks.protocol import Split

Arrays = tuple[NDArray, ...]


class Pages:
    """Base rows of a generator, by number.

    A page is a few rows in a line, made together. The training split has `n_train` base rows, over and over, or ever
    new ones where it is None; the other splits never repeat.
    """

    _ROWS = 16
    _SPARE_PAGES = 512

    def __init__(self, make: Callable[[random.Keys, Split], Arrays], n_train: int | None):
        """`make` gives the arrays, each (n, ...), of n rows from their keys (n,); a row must depend on its key only."""
        self._make, self._n_train = make, n_train
        self._most = (n_train or 0) // self._ROWS + 1 + self._SPARE_PAGES
        self._pages: dict[tuple[Split, int, int], Arrays] = {}

    def take(self, start: int, n: int, split: Split, seed: int) -> Arrays:
        """The arrays of base rows start ... start + n - 1."""
        rows = np.arange(start, start + n)
        if split == "train" and self._n_train is not None:
            rows %= self._n_train
        numbers, places = np.unique(rows // self._ROWS, return_inverse=True)
        pages = [self._page(split, seed, int(number)) for number in numbers]
        picked = places * self._ROWS + rows % self._ROWS
        return tuple(np.concatenate(parts)[picked] for parts in zip(*pages, strict=True))

    def _page(self, split: Split, seed: int, number: int) -> Arrays:
        key = (split, seed, number)
        if key not in self._pages:
            if len(self._pages) >= self._most:
                del self._pages[next(iter(self._pages))]  # the oldest
            self._pages[key] = self._make(random.row_keys(split, seed, number * self._ROWS, self._ROWS), split)
        return self._pages[key]
