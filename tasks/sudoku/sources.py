"""Where a stream of puzzles comes from: the generator, or a file. Both give base puzzles, before any symmetry."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.core.errors import UsageError
from zoo.tasks import random
from zoo.tasks.filing import Shelves
from zoo.tasks.paging import Pages
from zoo.tasks.protocol import SPLITS, Split
from zoo.tasks.sudoku.boards import SIZE_OF, Boards, tables
from zoo.tasks.sudoku.files import check_unique, read_puzzles
from zoo.tasks.sudoku.solver import fingerprint, solve


class Puzzles(NamedTuple):
    """Puzzles and solutions (n, cells) uint8, and the solver's guesses (n,) int64."""

    puzzles: Boards
    solutions: Boards
    guesses: NDArray[np.int64]


class Source(Protocol):
    """Base puzzles by row."""

    def take(self, start: int, n: int, split: Split, seed: int) -> Puzzles:
        """The base puzzles of rows start ... start + n - 1; those of a training stream come back every epoch."""


class Generator:
    """Puzzles made to order."""

    _MAX_TRIES = 10_000

    def __init__(self, size: int, lowest: int, highest: int, minimal: bool, min_guesses: int, n_train: int):
        """Puzzles with lowest <= givens <= highest and at least `min_guesses`; `n_train` in a training epoch."""
        self._size, self._range, self._minimal, self._min_guesses = size, (lowest, highest), minimal, min_guesses
        self._pages = Pages(self._make, n_train)

    def take(self, start: int, n: int, split: Split, seed: int) -> Puzzles:
        return Puzzles(*self._pages.take(start, n, split, seed))

    def _make(self, keys: random.Keys, split: Split) -> Puzzles:
        from zoo.tasks.kernels import sudoku as kernels

        n, cells = len(keys), self._size**2
        made = Puzzles(np.zeros((n, cells), np.uint8), np.zeros((n, cells), np.uint8), np.zeros(n, np.int64))
        finished = kernels.generate(
            keys, *self._range, self._minimal, self._min_guesses, SPLITS.index(split), random.SPLIT_SALT,
            self._MAX_TRIES, *tables(self._size), *made,
        )  # fmt: skip
        if finished < n:
            lowest, highest = self._range
            kind = ("minimal " if self._minimal else "") + "puzzle"
            rule = f"{lowest} givens" if lowest == highest else f"{lowest} to {highest} givens"
            rule += f" and {self._min_guesses} guesses" if self._min_guesses else ""
            raise UsageError(
                f"sudoku: found no {kind} of size {self._size} with {rule} for the split {split!r} in {self._MAX_TRIES}"
                " tries; ask for less, or give such puzzles by `path`."
            )
        return made


class FromFile:
    """The puzzles of a file, split by fingerprint; a second file, where given, is the whole test split."""

    def __init__(self, size: int, path: str, test_path: str | None, n_train: int | None):
        """`n_train` puzzles, chosen by the seed, make a training epoch; all, where it is None.

        Raises:
            UsageError: a file is unreadable or wrong, or holds puzzles of another size.
        """
        self._files = [_RatedFile(p, size) for p in (path, test_path) if p is not None]
        prints = [file.fingerprints for file in self._files]
        self._shelves = Shelves(path, prints[0], prints[1] if test_path else None, n_train)

    def take(self, start: int, n: int, split: Split, seed: int) -> Puzzles:
        second, rows = self._shelves.rows(start, n, split, seed)
        return self._files[second].take(rows)


class _RatedFile:
    """The puzzles of one file; rated, and checked to have one solution, when first taken."""

    def __init__(self, path: str, size: int):
        self._path, self._file = path, read_puzzles(path)
        given = SIZE_OF[self._file.puzzles.shape[1]]
        if given != size:
            raise UsageError(f"sudoku: {path!r} holds {given}x{given} puzzles and size is {size}; set size={given}.")
        self._guesses = np.full(len(self._file.puzzles), -1, dtype=np.int64)
        self.fingerprints = fingerprint(self._file.puzzles, self._file.solutions)

    def take(self, rows: NDArray[np.int64]) -> Puzzles:
        new = rows[self._guesses[rows] < 0]
        if len(new):
            solved = solve(self._file.puzzles[new])
            check_unique(self._path, self._file.lines[new], solved.n_solutions)
            self._guesses[new] = solved.guesses
        return Puzzles(self._file.puzzles[rows], self._file.solutions[rows], self._guesses[rows])
