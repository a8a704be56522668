"""Properties of puzzles: their solutions, difficulty, minimality, and whether two are equal up to symmetry."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.core.errors import UsageError
from zoo.tasks import random
from zoo.tasks.sudoku.boards import BOXES, SIZE_OF, Boards, tables


class Solved(NamedTuple):
    """Answers for n puzzles.

    Attributes:
        solutions: (n, cells) uint8, the first solution found, zeros where there is none.
        n_solutions: (n,) int64, at most `limit`.
        guesses: (n,) int64, the digits tried where naked and hidden singles force nothing: the difficulty.
    """

    solutions: Boards
    n_solutions: NDArray[np.int64]
    guesses: NDArray[np.int64]


def solve(puzzles: ArrayLike, *, limit: int = 2) -> Solved:
    """Solve puzzles (n, cells), 0 for blank, counting solutions up to `limit` (2 distinguishes one from several).

    Depth-first search on bit sets: naked and hidden singles are placed until none is left, then the cell with the
    fewest digits is tried. With the default limit the guesses include those that prove the solution to be the only one.

    Raises:
        UsageError: no boards of 4x4, 6x6 or 9x9 cells, or digits out of range.
    """
    from zoo.tasks.kernels import sudoku as kernels

    boards, size = as_boards(puzzles)
    n = len(boards)
    result = Solved(np.zeros_like(boards), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64))
    kernels.solve(boards, tables(size).peers, tables(size).units, limit, *result)
    return result


def is_minimal(puzzles: ArrayLike) -> NDArray[np.bool_]:
    """(n,) whether no given of puzzles (n, cells), each with one solution, can be left out."""
    from zoo.tasks.kernels import sudoku as kernels

    boards, size = as_boards(puzzles)
    result = np.zeros(len(boards), dtype=np.bool_)
    kernels.minimal(boards, tables(size).peers, tables(size).units, result)
    return result


def fingerprint(puzzles: ArrayLike, solutions: ArrayLike) -> random.Keys:
    """(n,) a hash of each puzzle that no symmetry changes: digits, lines in bands, bands, transposition.

    4x4 and 6x6: of the exact canonical form of the puzzle. 9x9: of its solution, so that two puzzles with (up to
    symmetry) the same solution also share it.
    """
    from zoo.tasks.kernels import sudoku as kernels

    boards, size = as_boards(puzzles)
    result = np.zeros(len(boards), dtype=np.uint64)
    kernels.fingerprints(boards, as_boards(solutions)[0], tables(size).maps, result)
    return result


def augment(puzzles: ArrayLike, solutions: ArrayLike, keys: random.Keys) -> tuple[Boards, Boards]:
    """Puzzles and solutions (n, cells) under one random symmetry each, drawn from `keys` (n,)."""
    from zoo.tasks.kernels import sudoku as kernels

    boards, size = as_boards(puzzles)
    full = as_boards(solutions)[0]
    new_boards, new_solutions = np.empty_like(boards), np.empty_like(full)
    kernels.augment(keys, boards, full, size, *BOXES[size], new_boards, new_solutions)
    return new_boards, new_solutions


def as_boards(puzzles: ArrayLike) -> tuple[Boards, int]:
    """Puzzles as (n, cells) uint8, and their size."""
    boards = np.asarray(puzzles)
    size = SIZE_OF.get(boards.shape[1]) if boards.ndim == 2 else None
    if size is None:
        raise UsageError(f"sudoku: boards come as (n, 16), (n, 36) or (n, 81), not {boards.shape}.")
    if boards.size and (boards.min() < 0 or boards.max() > size):
        raise UsageError(
            f"sudoku: cells of a {size}x{size} board are 0 to {size}, not {boards.min()} to {boards.max()}."
        )
    return np.ascontiguousarray(boards, dtype=np.uint8), size
