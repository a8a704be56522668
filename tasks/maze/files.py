"""Mazes in files, in the forms that people have them.

- tables (CSV) with a column of mazes, whatever else they hold: `source,question,answer,rating`, `maze,solution`, ... in
  any case, quoted or not. A maze is one text, row after row, or has its rows on lines of their own;
- mazes drawn line by line, with empty lines between them.

Walls are `#`, open cells ` `, the start `S`, the goal `G` and the path `o`; or `E` and `X` for the last two, as
maze-dataset writes them. A path that is drawn in is the answer.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.core.readers import at_line, read_text, shown
from zoo.tasks.filing import COLUMNS, Rows, decode, read_table, require, rows_of, write_rows
from zoo.tasks.maze.grids import CHARACTERS, Grids, as_grids, is_valid, solve, to_text

FORMS = (
    "read are CSV with a header such as source,question,answer,rating or maze,solution, and mazes drawn line by line"
)
_FOREIGN = str.maketrans("EX", "Go")  # of maze-dataset
_DRAWN = set(CHARACTERS + "EX")


class MazeFile(NamedTuple):
    """The n mazes of a file, all of one size.

    Attributes:
        grids, answers: (n, height * width) uint8 tokens; answers are the file's, or where it has none, the solver's.
        lengths: (n,) int64, steps of the shortest path.
        height, width: of every maze.
        lines: (n,) int64, the line of each maze in the file, from 1.
    """

    grids: Grids
    answers: Grids
    lengths: NDArray[np.int64]
    height: int
    width: int
    lines: NDArray[np.int64]


def read_mazes(path: str | Path, height: int | None = None, width: int | None = None) -> MazeFile:
    """Read mazes. Their size is that of the lines they are drawn in; where there are none they are square, unless
    `height` and `width` say otherwise. The ratings are not used.

    Raises:
        UsageError: the file cannot be read, or a line is wrong; names the file and the line.
    """
    lines, drawings, answers, _ = _read_rows(path)
    questions = [_cells(path, line, drawing) for line, drawing in zip(lines.tolist(), drawings, strict=True)]
    answers = [_cells(path, line, answer) for line, answer in zip(lines.tolist(), answers, strict=True)]
    cells = len(questions[0])
    rows = drawings[0].strip("\r\n").splitlines()
    if len(rows) > 1:
        drawn_in = len(rows), len(rows[0])
        if drawn_in != (height or drawn_in[0], width or drawn_in[1]):
            told = f"the maze is drawn in {drawn_in[0]} rows of {drawn_in[1]}, and height={height} and width={width}"
            raise at_line(path, int(lines[0]), told)
        height, width = drawn_in
    if height is None or width is None:
        height = width = isqrt(cells)
        if height * width != cells or not cells:
            message = f"a maze of {cells} cells is not square; give its height and width"
            raise at_line(path, int(lines[0]), message)
    tokens = {character: i for i, character in enumerate(CHARACTERS, 1)}
    del tokens["o"]
    grids = decode(path, lines, questions, tokens, height * width, "question")
    drawn, lengths = solve(grids, height, width)
    require(path, lines, lengths > 0, "the maze needs one S, one G and a way from one to the other")
    given = np.array([bool(a) for a in answers])
    if given.any():
        tokens = {character: i for i, character in enumerate(CHARACTERS, 1)}
        drawn[given] = decode(path, lines[given], [a for a in answers if a], tokens, height * width, "answer")
        fits = is_valid(grids[given], drawn[given], height, width)
        require(path, lines[given], fits, "the answer is not the maze with a shortest path")
    return MazeFile(grids, drawn, lengths, height, width, lines)


def _read_rows(path: str | Path) -> Rows:
    text = read_text(path)
    table = read_table(path, text, COLUMNS)
    if table is not None:
        return rows_of(path, [(n, row["question"], row.get("answer", ""), row.get("rating", "")) for n, row in table])
    found: list[tuple[int, str, str, str]] = []
    block: list[str] = []
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        if strange := set(line) - _DRAWN:
            raise at_line(path, number, f"{shown(min(strange))!r} is no cell of a maze; {FORMS}")
        if line.strip():
            block.append(line)
        elif block:
            drawn = "\n".join(block)
            open_ = drawn.translate(str.maketrans("oX", "  "))
            found.append((number - len(block), open_, "" if open_ == drawn else drawn, ""))
            block = []
    return rows_of(path, found)


def _cells(path: str | Path, line: int, drawing: str) -> str:
    """The cells of a maze as one text, in our characters."""
    rows = drawing.strip("\r\n").splitlines()
    if len({len(row) for row in rows}) > 1:
        raise at_line(path, line, f"the rows of the maze have {min(map(len, rows))} to {max(map(len, rows))} cells")
    return "".join(rows).translate(_FOREIGN)


def write_mazes(
    path: str | Path, grids: ArrayLike, answers: ArrayLike, height: int, width: int, source: str = "generated"
) -> None:
    """Write mazes and answers (n, cells) in the public CSV form, rated by the length of the shortest path."""
    mazes, drawn = as_grids(grids, height, width), as_grids(answers, height, width)
    ratings = solve(mazes, height, width)[1].tolist()
    write_rows(path, source, map(to_text, mazes), map(to_text, drawn), ratings)
