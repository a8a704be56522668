"""Mazes in files: the public CSV form `source,question,answer,rating`, a maze as one text, row after row."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.filing import at_line, decode, read_rows, require, write_rows
from tasks.maze.grids import CHARACTERS, Grids, as_grids, is_valid, solve, to_text


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
    """Read mazes; square, unless `height` and `width` say otherwise. The ratings are not used.

    Raises:
        UsageError: the file cannot be read, or a line is wrong; names the file and the line.
    """
    lines, questions, answers, _ = read_rows(path, plain=False)
    cells = len(questions[0])
    if height is None or width is None:
        height = width = isqrt(cells)
        if height * width != cells or not cells:
            message = f"a maze of {cells} characters is not square; give its height and width"
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


def write_mazes(
    path: str | Path, grids: ArrayLike, answers: ArrayLike, height: int, width: int, source: str = "generated"
) -> None:
    """Write mazes and answers (n, cells) in the public CSV form, rated by the length of the shortest path."""
    mazes, drawn = as_grids(grids, height, width), as_grids(answers, height, width)
    ratings = solve(mazes, height, width)[1].tolist()
    write_rows(path, source, map(to_text, mazes), map(to_text, drawn), ratings)
