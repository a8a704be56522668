"""Where a stream of mazes comes from: the generator, or a file."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.core.errors import UsageError
from zoo.tasks import random
from zoo.tasks.filing import Shelves
from zoo.tasks.maze.files import read_mazes
from zoo.tasks.maze.grids import Grids, fingerprint, symmetries
from zoo.tasks.paging import Pages
from zoo.tasks.protocol import SPLITS, Split


class Mazes(NamedTuple):
    """Mazes and answers (n, cells) uint8, and the lengths of their shortest paths (n,) int64."""

    grids: Grids
    answers: Grids
    lengths: NDArray[np.int64]


class Source(Protocol):
    """Mazes by row."""

    def take(self, start: int, n: int, split: Split, seed: int) -> Mazes:
        """The mazes of rows start ... start + n - 1."""


class Generator:
    """Mazes made to order."""

    _MAX_TRIES = 500_000

    def __init__(
        self,
        height: int,
        width: int,
        perfect: bool,
        unique: bool,
        walls: tuple[float, float],
        shortest: int,
        longest: int | None,
        n_train: int | None,
    ):
        """Path lengths uniform in [shortest, longest], or any from `shortest` on; `n_train` mazes in an epoch."""
        self._size, self._perfect, self._unique, self._walls = (height, width), perfect, unique, walls
        self._shortest, self._longest = shortest, longest
        self._pages = Pages(self._make, n_train)

    def take(self, start: int, n: int, split: Split, seed: int) -> Mazes:
        return Mazes(*self._pages.take(start, n, split, seed))

    def _make(self, keys: random.Keys, split: Split) -> Mazes:
        from zoo.tasks.kernels import maze as kernels

        n, (height, width) = len(keys), self._size
        made = Mazes(
            np.empty((n, height * width), np.uint8), np.empty((n, height * width), np.uint8), np.empty(n, np.int64)
        )
        longest = -1 if self._longest is None else self._longest
        finished = kernels.generate(
            keys, height, width, self._perfect, self._unique, *self._walls, self._shortest, longest,
            SPLITS.index(split), random.SPLIT_SALT, self._MAX_TRIES, symmetries(height, width), *made,
        )  # fmt: skip
        if finished < n:
            kind = "maze of one shortest path" if self._unique else "maze"
            bounds = f"min_length={self._shortest}" + ("" if self._longest is None else f", max_length={self._longest}")
            raise UsageError(
                f"maze: found no {height}x{width} {kind} with {bounds} for the split {split!r} in {self._MAX_TRIES}"
                " tries; ask for shorter paths or a larger maze."
            )
        return made


class FromFile:
    """The mazes of a file, split by fingerprint; a second file, where given, is the whole test split."""

    def __init__(self, height: int, width: int, path: str, test_path: str | None, n_train: int | None):
        """`n_train` mazes, chosen by the seed, make a training epoch; all, where it is None.

        Raises:
            UsageError: a file is unreadable or wrong, or holds mazes of another size.
        """
        files = [read_mazes(p, height, width) for p in (path, test_path) if p is not None]
        self._files = [Mazes(file.grids, file.answers, file.lengths) for file in files]
        prints = [fingerprint(file.grids, height, width) for file in files]
        self._shelves = Shelves(path, prints[0], prints[1] if test_path else None, n_train)

    def take(self, start: int, n: int, split: Split, seed: int) -> Mazes:
        second, rows = self._shelves.rows(start, n, split, seed)
        grids, answers, lengths = self._files[second]
        return Mazes(grids[rows], answers[rows], lengths[rows])
