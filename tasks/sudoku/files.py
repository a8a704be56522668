"""Puzzles in files: the public CSV form `source,question,answer,rating`, and plain lines of 16, 36 or 81 characters."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.filing import at_line, decode, read_rows, require, write_rows
from tasks.sudoku.boards import SIZE_OF, Boards, is_solution, to_text
from tasks.sudoku.solver import as_boards, solve


class PuzzleFile(NamedTuple):
    """The n puzzles of a file, all of one size.

    Attributes:
        puzzles, solutions: (n, cells) uint8; solutions are the file's, or where it has none, the solver's.
        ratings: (n,) int64, the file's, -1 where it has none.
        lines: (n,) int64, the line of each puzzle in the file, from 1.
    """

    puzzles: Boards
    solutions: Boards
    ratings: NDArray[np.int64]
    lines: NDArray[np.int64]


def read_puzzles(path: str | Path) -> PuzzleFile:
    """Read a CSV (told by its header) or a file of plain lines; `.` and `0` are blanks.

    A puzzle that comes without an answer is solved, and must have exactly one solution; a given answer must be a
    solution.

    Raises:
        UsageError: the file cannot be read, or a line is wrong; names the file and the line.
    """
    lines, questions, answers, ratings = read_rows(path, plain=True)
    questions, answers = [q.strip() for q in questions], [a.strip() for a in answers]
    size = SIZE_OF.get(len(questions[0]))
    if size is None:
        raise at_line(path, int(lines[0]), f"the puzzle has {len(questions[0])} characters, not 16, 36 or 81")
    digits = {str(d): d for d in range(1, size + 1)}
    puzzles = decode(path, lines, questions, {".": 0, "0": 0} | digits, size * size, "puzzle")
    solutions = np.zeros_like(puzzles)
    given = np.array([bool(a) for a in answers])
    if given.any():
        solutions[given] = decode(path, lines[given], [a for a in answers if a], digits, size * size, "answer")
        fits = is_solution(solutions[given], size) & ((puzzles == 0) | (puzzles == solutions))[given].all(1)
        require(path, lines[given], fits, "the answer does not solve the puzzle")
    if not given.all():
        solved = solve(puzzles[~given])
        check_unique(path, lines[~given], solved.n_solutions)
        solutions[~given] = solved.solutions
    numbers = [_rating(path, line, rating) for line, rating in zip(lines.tolist(), ratings, strict=True)]
    return PuzzleFile(puzzles, solutions, np.array(numbers, dtype=np.int64), lines)


def check_unique(path: str | Path, lines: NDArray[np.int64], n_solutions: NDArray[np.int64]) -> None:
    """Raises UsageError, naming file and line, unless every puzzle has exactly one solution."""
    require(path, lines, n_solutions > 0, "the puzzle has no solution")
    require(path, lines, n_solutions < 2, "the puzzle has more than one solution")


def write_csv(
    path: str | Path, puzzles: ArrayLike, solutions: ArrayLike, ratings: ArrayLike, source: str = "generated"
) -> None:
    """Write puzzles, solutions (n, cells) and ratings (n,) in the public CSV form."""
    questions, answers = map(to_text, as_boards(puzzles)[0]), map(to_text, as_boards(solutions)[0])
    write_rows(path, source, questions, answers, np.asarray(ratings, dtype=np.int64).tolist())


def write_lines(path: str | Path, puzzles: ArrayLike) -> None:
    """Write puzzles (n, cells) as plain lines, `.` for blank."""
    text = "".join(to_text(board) + "\n" for board in as_boards(puzzles)[0])
    Path(path).write_text(text, encoding="utf-8")


def _rating(path: str | Path, line: int, text: str) -> int:
    text = text.strip()
    if not text:
        return -1
    if not text.isdecimal():
        raise at_line(path, line, f"the rating {text!r} is not a whole number")
    return int(text)
