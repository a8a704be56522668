"""Grids: turns and flips, their tokens on a square canvas, and grids read back from tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.uint8]
"""(height, width) colours, 0 (black) to 9."""

COLOURS = 10
LARGEST = 30
"""Most cells on a side that a public grid has."""
PAD, END, FIRST = 0, 1, 2
"""Tokens: padding, the line behind the last row and column, the first of the ten colours."""
TURNS = 8


class Pair(NamedTuple):
    """A grid, and the rule's answer to it."""

    question: Grid
    answer: Grid


class Puzzle(NamedTuple):
    """Demonstrations of a rule, and the pairs that ask for it.

    Attributes:
        name: its name in its set.
        train: the demonstrations.
        test: the pairs whose answers the model must find.
    """

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @property
    def side(self) -> int:
        """The longest side of its grids."""
        return max(max(grid.shape) for pair in (*self.train, *self.test) for grid in pair)


def turn(grid: Grid, number: int) -> Grid:
    """One of the eight turns and flips: from 4 on transposed first, then turned by `number` % 4 quarters."""
    return np.rot90(grid.T if number >= 4 else grid, number % 4)


def turn_back(grid: Grid, number: int) -> Grid:
    """What `turn` undoes."""
    straight = np.rot90(grid, -(number % 4))
    return straight.T if number >= 4 else straight


def to_tokens(grid: Grid, size: int, corner: tuple[int, int] = (0, 0)) -> NDArray[np.int64]:
    """(size, size) tokens of a grid that lies at a corner, with its end marked below and to the right of it."""
    (y, x), (height, width) = corner, grid.shape
    canvas = np.full((size, size), PAD, dtype=np.int64)
    bottom, right = y + height, x + width
    canvas[y:bottom, x:right] = grid
    canvas[y:bottom, x:right] += FIRST
    if bottom < size:
        canvas[bottom, x:right] = END
    if right < size:
        canvas[y:bottom, right] = END
    return canvas


def corner_of(canvas: NDArray[np.int64]) -> tuple[int, int]:
    """Where the grid on a canvas (size, size) begins, the first row and column that are not padding."""
    filled = canvas != PAD
    return int(filled.any(1).argmax()), int(filled.any(0).argmax())


def from_tokens(canvas: NDArray[np.int64], corner: tuple[int, int] = (0, 0)) -> Grid:
    """The largest rectangle of nothing but colours that begins at a corner; without cells, where there is none."""
    part = canvas[corner[0] :, corner[1] :]
    coloured = (part >= FIRST) & (part < FIRST + COLOURS)
    wide = np.minimum.accumulate(np.where(coloured.all(1), part.shape[1], coloured.argmin(1)))  # down to each row
    height = int((wide * np.arange(1, len(wide) + 1)).argmax()) + 1
    return (part[:height, : wide[height - 1]] - FIRST).astype(np.uint8)
