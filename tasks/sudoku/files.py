"""Puzzles in files: the public CSV form `source,question,answer,rating`, and plain lines of 16, 36 or 81 characters."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.registry import UsageError
from tasks.sudoku.boards import SIZE_OF, Boards, is_solution, to_text
from tasks.sudoku.solver import as_boards, solve

HEADER = ["source", "question", "answer", "rating"]


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
    lines, questions, answers, ratings = _read_rows(Path(path))
    size = SIZE_OF.get(len(questions[0]), 9)
    puzzles = _parse(path, lines, questions, size, "puzzle", ".0")
    solutions = np.zeros_like(puzzles)
    given = np.array([bool(a) for a in answers])
    if given.any():
        picked = [a for a in answers if a]
        solutions[given] = _parse(path, lines[given], picked, size, "answer", "")
        fits = is_solution(solutions[given], size) & ((puzzles == 0) | (puzzles == solutions))[given].all(1)
        _require(path, lines[given], fits, "the answer does not solve the puzzle")
    if not given.all():
        solved = solve(puzzles[~given])
        check_unique(path, lines[~given], solved.n_solutions)
        solutions[~given] = solved.solutions
    return PuzzleFile(puzzles, solutions, np.array(ratings, dtype=np.int64), lines)


def check_unique(path: str | Path, lines: NDArray[np.int64], n_solutions: NDArray[np.int64]) -> None:
    """Raises UsageError, naming file and line, unless every puzzle has exactly one solution."""
    _require(path, lines, n_solutions > 0, "the puzzle has no solution")
    _require(path, lines, n_solutions < 2, "the puzzle has more than one solution")


def write_csv(
    path: str | Path, puzzles: ArrayLike, solutions: ArrayLike, ratings: ArrayLike, source: str = "generated"
) -> None:
    """Write puzzles, solutions (n, cells) and ratings (n,) in the public CSV form."""
    boards, full = as_boards(puzzles)[0], as_boards(solutions)[0]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for board, solution, rating in zip(boards, full, np.asarray(ratings).tolist(), strict=True):
            writer.writerow([source, to_text(board), to_text(solution), rating])


def write_lines(path: str | Path, puzzles: ArrayLike) -> None:
    """Write puzzles (n, cells) as plain lines, `.` for blank."""
    text = "".join(to_text(board) + "\n" for board in as_boards(puzzles)[0])
    Path(path).write_text(text, encoding="utf-8")


def _read_rows(path: Path) -> tuple[NDArray[np.int64], list[str], list[str], list[int]]:
    """Line numbers, questions, answers ("" for none) and ratings (-1 for none)."""
    rows: list[tuple[int, str, str, int]] = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            first = file.readline().strip()
            file.seek(0)
            if first.split(",") == HEADER:
                reader = csv.reader(file)
                next(reader)
                for fields in reader:
                    if fields:
                        rows.append((reader.line_num, *_fields(path, reader.line_num, fields)))
            else:
                rows = [(number, line.strip(), "", -1) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"sudoku: cannot read {str(path)!r}: {error}.") from None
    if not rows:
        raise UsageError(f"sudoku: {str(path)!r} holds no puzzle.")
    numbers, questions, answers, ratings = zip(*rows, strict=True)
    return np.array(numbers, dtype=np.int64), list(questions), list(answers), list(ratings)


def _fields(path: Path, line: int, fields: Sequence[str]) -> tuple[str, str, int]:
    if len(fields) != len(HEADER):
        raise UsageError(f"sudoku: {path}:{line}: {len(fields)} fields, where {','.join(HEADER)} makes {len(HEADER)}.")
    rating = fields[3].strip()
    if not rating.lstrip("-").isdecimal():
        raise UsageError(f"sudoku: {path}:{line}: the rating {rating!r} is not a whole number.")
    return fields[1].strip(), fields[2].strip(), int(rating)


def _parse(
    path: str | Path, lines: NDArray[np.int64], texts: list[str], size: int, what: str, blanks: str
) -> Boards:
    """Boards (n, cells) of texts, which must all have the same length and no strange character."""
    cells = size * size
    lengths = np.array([len(t) for t in texts])
    allowed = f"{cells} characters" if len(texts[0]) == cells else "16, 36 or 81 characters"
    _require(path, lines, lengths == cells, f"a {what} here has {allowed}, not {{}}", lengths)
    raw = np.frombuffer("".join(texts).encode("latin-1", "replace"), dtype=np.uint8).reshape(-1, cells)
    table = np.full(256, 255, dtype=np.uint8)
    table[[ord(b) for b in blanks]] = 0
    table[ord("1") : ord("1") + size] = np.arange(1, size + 1)
    boards = table[raw]
    strange = boards == 255
    first = np.array([chr(c) for c in raw[np.arange(len(raw)), strange.argmax(1)]])
    allowed = f"1 to {size}" + (", `.` and `0`" if blanks else "")
    _require(path, lines, ~strange.any(1), f"{{!r}} in a {what}, where only {allowed} may stand", first)
    return boards


def _require(
    path: str | Path, lines: NDArray[np.int64], right: NDArray[np.bool_], message: str, given: NDArray | None = None
) -> None:
    """Raises UsageError for the first row that is not right."""
    if not right.all():
        row = int(np.argmin(right))
        detail = message if given is None else message.format(given[row].item())
        raise UsageError(f"sudoku: {path}:{lines[row]}: {detail}.")
