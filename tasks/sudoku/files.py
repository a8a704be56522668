"""Puzzles in files, in the forms that people have them.

- tables (CSV) with a column of puzzles, whatever else they hold: `source,question,answer,rating`, `quizzes,solutions`,
  `puzzle,solution`, `id,puzzle,solution,clues,difficulty`, ... in any case, quoted or not;
- a puzzle a line, of 16, 36 or 81 cells, alone or with an answer and other fields beside it (`puzzle:n:solution`);
- a puzzle in 4, 6 or 9 lines, each a row (`.sdk` and others).

Digits may stand apart, and boxes be ruled off by `|`, `-` and `+`. Blanks are `.`, `0`, `_`, `*` or `x`. What follows
`#` or `//` is a comment; the first line, and one right before a puzzle in rows, may be a title.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.core.readers import at_line, read_text, shown
from zoo.tasks.filing import COLUMNS, Rows, decode, read_table, require, rows_of, write_rows
from zoo.tasks.sudoku.boards import SIZE_OF, Boards, is_solution, to_text
from zoo.tasks.sudoku.solver import as_boards, solve

FORMS = (
    "read are CSV with a header such as question,answer or quizzes,solutions or puzzle,solution; a puzzle a line, of"
    " 16, 36 or 81 cells; and a puzzle in 4, 6 or 9 lines"
)
_BLANKS = str.maketrans("0_*xX", ".....")
_LINE_BLANKS = str.maketrans("0_*xX-?", ".......")  # where a puzzle is one line, no rule can be meant
_BETWEEN = str.maketrans("", "", " \t|!,;\u2502\u2503\u2551")  # what may stand between the cells of a row
_RULE = re.compile(r"[-+=|:~\s\u2500-\u257f]+")
_CELLS = re.compile(r"[.1-9]+")
_FIELDS = re.compile(r"[\s,;:|]+")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_LONGEST_TITLE = 80  # within a file
_SIDES = set(SIZE_OF.values())


class PuzzleFile(NamedTuple):
    """The n puzzles of a file, all of one size.

    Attributes:
        puzzles, solutions: (n, cells) uint8; solutions are the file's, or where it has none, the solver's.
        ratings: (n,) float64, the file's, -1 where it has none that is a number.
        lines: (n,) int64, the line of each puzzle in the file, from 1.
    """

    puzzles: Boards
    solutions: Boards
    ratings: NDArray[np.float64]
    lines: NDArray[np.int64]


def read_puzzles(path: str | Path) -> PuzzleFile:
    """Read the puzzles of a file in any of the forms above.

    A puzzle that comes without an answer is solved, and must have exactly one solution; a given answer must be a
    solution.

    Raises:
        UsageError: the file cannot be read, or a line is wrong; names the file and the line.
    """
    lines, questions, answers, ratings = _read_rows(path)
    size = SIZE_OF.get(len(questions[0]))
    if size is None:
        raise at_line(path, int(lines[0]), f"the puzzle has {len(questions[0])} cells, not 16, 36 or 81; {FORMS}")
    digits = {str(d): d for d in range(1, size + 1)}
    puzzles = decode(path, lines, questions, {".": 0} | digits, size * size, "puzzle")
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
    return PuzzleFile(puzzles, solutions, np.array([_rating(rating) for rating in ratings]), lines)


def _read_rows(path: str | Path) -> Rows:
    text = read_text(path)
    table = read_table(path, text, COLUMNS)
    if table is None or (table and len(_joined(table[0][1]["question"])) in _SIDES):  # a title, then rows
        return rows_of(path, list(_loose_rows(path, text)))
    rows = []
    for line, row in table:
        question, answer = (_joined(row.get(key, "")) for key in ("question", "answer"))
        rows.append((line, question, answer, row.get("rating", "")))
    return rows_of(path, rows)


def _joined(text: str) -> str:
    """The cells of a board as one line of digits and points."""
    if "\n" in text or "\r" in text:
        text = "".join(row for row in text.splitlines() if not _RULE.fullmatch(row))
    return text.translate(_BETWEEN).translate(_BLANKS)


def _loose_rows(path: str | Path, text: str) -> Iterator[tuple[int, str, str, str]]:
    """The puzzles of a file without a header, each with the line where it begins."""
    rows: list[str] = []
    begin, titled, skipped, seen = 0, 0, False, False
    for number, raw in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        line = re.split(r"#|//", raw, maxsplit=1)[0].strip()
        if line.startswith("["):  # a section of an .sdk file
            skipped = line.lower() != "[puzzle]"
            continue
        if skipped or not line or _RULE.fullmatch(line):
            continue
        cells = _joined(line)
        if _CELLS.fullmatch(cells) is None:
            cells = ""
        if len(cells) in _SIDES and (not rows or len(rows[0]) == len(cells)):
            begin = begin if rows else number
            rows.append(cells)
            titled, seen = 0, True
            if len(rows) == len(cells):
                yield begin, "".join(rows), "", ""
                rows = []
            continue
        if rows:
            raise at_line(path, number, f"the puzzle of line {begin} has {len(rows)} rows of {len(rows[0])}; {FORMS}")
        if found := _in_fields(line, cells):
            yield (number, *found)
        elif cells or not _is_title(line) or (seen and (titled or len(line) > _LONGEST_TITLE)):
            told = f"the puzzle has {len(cells)} cells" if cells else f"{shown(line[:40])!r} is no puzzle"
            raise at_line(path, number, f"{told}; {FORMS}")
        else:
            titled = number
            continue
        titled, seen = 0, True
    if rows:
        raise at_line(path, begin, f"the puzzle has {len(rows)} rows of {len(rows[0])}; {FORMS}")
    if titled:
        raise at_line(path, titled, f"no puzzle follows; {FORMS}")


def _in_fields(line: str, cells: str) -> tuple[str, str, str] | None:
    """Puzzle, answer and rating of a line that holds a puzzle, alone or among other fields."""
    if len(cells) in SIZE_OF:
        return cells, "", ""
    fields = [field.translate(_LINE_BLANKS) for field in _FIELDS.split(line)]
    boards = [field for field in fields if len(field) in SIZE_OF and _CELLS.fullmatch(field)]
    if not boards or len(boards) > 2 or len({len(board) for board in boards}) > 1:
        return None
    answer = boards[1] if len(boards) == 2 else ""
    return boards[0], answer, ""


def _is_title(line: str) -> bool:
    """Whether a line may be a title: words, such as "Grid 02"."""
    return re.match(r"[A-Za-z]{2}", line) is not None


def check_unique(path: str | Path, lines: NDArray[np.int64], n_solutions: NDArray[np.int64]) -> None:
    """Raises UsageError, naming file and line, unless every puzzle has exactly one solution."""
    require(path, lines, n_solutions > 0, "the puzzle has no solution")
    require(path, lines, n_solutions < 2, "the puzzle has more than one solution")


def write_csv(
    path: str | Path, puzzles: ArrayLike, solutions: ArrayLike, ratings: ArrayLike, source: str = "generated"
) -> None:
    """Write puzzles, solutions (n, cells) and ratings (n,) in the public CSV form."""
    questions, answers = map(to_text, as_boards(puzzles)[0]), map(to_text, as_boards(solutions)[0])
    whole = (int(r) if r == int(r) else r for r in np.asarray(ratings, dtype=np.float64).tolist())
    write_rows(path, source, questions, answers, whole)


def write_lines(path: str | Path, puzzles: ArrayLike) -> None:
    """Write puzzles (n, cells) as plain lines, `.` for blank."""
    text = "".join(to_text(board) + "\n" for board in as_boards(puzzles)[0])
    Path(path).write_text(text, encoding="utf-8")


def _rating(text: str) -> float:
    """A rating as a number; -1 where there is none, or a word."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else -1.0
