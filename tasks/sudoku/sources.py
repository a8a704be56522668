"""Where a stream of puzzles comes from: the generator, or a file. Both give base puzzles, before any symmetry."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks import random
from tasks.protocol import SPLITS, Split
from tasks.registry import UsageError
from tasks.sudoku.boards import Boards, tables
from tasks.sudoku.files import PuzzleFile, check_unique, read_puzzles
from tasks.sudoku.solver import fingerprint, solve


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
    """Puzzles made to order, each from its own key; made once, then kept."""

    _PAGE = 32
    _MAX_TRIES = 10_000
    _KEPT_EVALUATION_PAGES = 512

    def __init__(self, size: int, lowest: int, highest: int, minimal: bool, min_guesses: int, n_train: int):
        """Puzzles with lowest <= givens <= highest and at least `min_guesses`; `n_train` in a training epoch."""
        self._size, self._range, self._minimal, self._min_guesses = size, (lowest, highest), minimal, min_guesses
        self._n_train = n_train
        self._max_pages = n_train // self._PAGE + 1 + self._KEPT_EVALUATION_PAGES
        self._pages: dict[tuple[Split, int, int], Puzzles] = {}

    def take(self, start: int, n: int, split: Split, seed: int) -> Puzzles:
        rows = np.arange(start, start + n)
        if split == "train":
            rows %= self._n_train
        numbers, places = np.unique(rows // self._PAGE, return_inverse=True)
        pages = [self._page(split, seed, int(number)) for number in numbers]
        picked = places * self._PAGE + rows % self._PAGE
        return Puzzles(*(np.concatenate(parts)[picked] for parts in zip(*pages, strict=True)))

    def _page(self, split: Split, seed: int, number: int) -> Puzzles:
        key = (split, seed, number)
        if key not in self._pages:
            if len(self._pages) >= self._max_pages:
                del self._pages[next(iter(self._pages))]  # the oldest
            self._pages[key] = self._make(random.row_keys(split, seed, number * self._PAGE, self._PAGE), split)
        return self._pages[key]

    def _make(self, keys: random.Keys, split: Split) -> Puzzles:
        from tasks.kernels import sudoku as kernels

        n, cells = len(keys), self._size**2
        made = Puzzles(np.zeros((n, cells), np.uint8), np.zeros((n, cells), np.uint8), np.zeros(n, np.int64))
        finished = kernels.generate(
            random.fold(keys, 0), *self._range, self._minimal, self._min_guesses, SPLITS.index(split),
            random.SPLIT_SALT, self._MAX_TRIES, *tables(self._size), *made,
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
        self._n_train = n_train
        self._order: tuple[int, NDArray[np.int64]] | None = None
        main = _Shelf(path, read_puzzles(path), size)
        member = random.split_of(main.fingerprints)
        self._shelves = {split: main for split in SPLITS}
        self._members = {split: np.flatnonzero(member == i) for i, split in enumerate(SPLITS)}
        if test_path is not None:
            test = _Shelf(test_path, read_puzzles(test_path), size)
            free = ~np.isin(main.fingerprints, test.fingerprints)
            self._shelves["test"] = test
            self._members = {
                "train": np.flatnonzero(free & (member != SPLITS.index("validation"))),
                "validation": np.flatnonzero(free & (member == SPLITS.index("validation"))),
                "test": np.arange(len(test.fingerprints)),
            }

    def take(self, start: int, n: int, split: Split, seed: int) -> Puzzles:
        shelf, members = self._shelves[split], self._members[split]
        if not len(members):
            raise UsageError(f"sudoku: no puzzle of {shelf.path!r} falls into the split {split!r}; give more puzzles.")
        if split == "train":
            members = self._shuffled(members, seed)
        return shelf.take(members[np.arange(start, start + n) % len(members)])

    def _shuffled(self, members: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != seed:
            key = random.fold(random.row_keys("train", seed, 0, 1), 1)
            self._order = seed, members[random.permutation(key, len(members))[: self._n_train]]
        return self._order[1]


class _Shelf:
    """The puzzles of one file; rated, and checked to have one solution, when first taken."""

    def __init__(self, path: str, file: PuzzleFile, size: int):
        cells = file.puzzles.shape[1]
        if cells != size * size:
            given = round(cells**0.5)
            raise UsageError(f"sudoku: {path!r} holds {given}x{given} puzzles and size is {size}; set size={given}.")
        self.path, self._file = path, file
        self._guesses = np.full(len(file.puzzles), -1, dtype=np.int64)
        self.fingerprints = fingerprint(file.puzzles, file.solutions)

    def take(self, rows: NDArray[np.int64]) -> Puzzles:
        new = rows[self._guesses[rows] < 0]
        if len(new):
            solved = solve(self._file.puzzles[new])
            check_unique(self.path, self._file.lines[new], solved.n_solutions)
            self._guesses[new] = solved.guesses
        return Puzzles(self._file.puzzles[rows], self._file.solutions[rows], self._guesses[rows])
