"""Boards of three sizes: their lines and boxes, their symmetries, and boards as text.

A board is a flat array of size * size digits, row by row, 0 for blank.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.tasks import random

Boards = NDArray[np.uint8]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Box height and width by size."""
FEWEST = {4: 4, 6: 8, 9: 17}
"""The fewest givens that can leave one solution, by size."""
SIZE_OF = {size * size: size for size in BOXES}
"""Size by number of cells."""


class Tables(NamedTuple):
    """Index tables of one size.

    Attributes:
        peers: (cells, p) the cells that share a line or box with each cell.
        units: (3 * size, size) the cells of each box, row and column, boxes first.
        maps: (m, cells) every symmetry of positions as the old cell of each new one; one row, unused, for 9x9, which
            has 3,359,232.
    """

    peers: NDArray[np.int64]
    units: NDArray[np.int64]
    maps: NDArray[np.int64]


@cache
def tables(size: int) -> Tables:
    """The tables of a size."""
    height, width = BOXES[size]
    cells = np.arange(size * size).reshape(size, size)
    boxes = cells.reshape(size // height, height, size // width, width).swapaxes(1, 2).reshape(size, size)
    units = np.concatenate([boxes, cells, cells.T])
    peers = [np.setdiff1d(units[(units == cell).any(1)], cell) for cell in range(size * size)]
    return Tables(np.stack(peers), np.ascontiguousarray(units), _maps(size) if size < 9 else cells.reshape(1, -1))


def _maps(size: int) -> NDArray[np.int64]:
    height, width = BOXES[size]
    cells = np.arange(size * size).reshape(size, size)
    maps = [
        cells[np.ix_(rows, columns)].ravel()
        for rows in _line_orders(size // height, height)
        for columns in _line_orders(size // width, width)
    ]
    if height == width:
        maps += [cells.T.ravel()[m] for m in maps]
    return np.stack(maps)


def _line_orders(n_groups: int, group: int) -> list[list[int]]:
    inner = list(permutations(range(group)))
    return [
        [g * group + k for g, order in zip(groups, orders, strict=True) for k in order]
        for groups in permutations(range(n_groups))
        for orders in product(inner, repeat=n_groups)
    ]


def count_symmetries(size: int) -> int:
    """How many maps there are of boards onto boards: of digits, lines in bands, bands, and transposition."""
    height, width = BOXES[size]
    lines = [math.factorial(n) * math.factorial(size // n) ** n for n in (size // height, size // width)]
    return math.factorial(size) * math.prod(lines) * (1 + (height == width))


def symmetry(size: int, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random symmetry, drawn by its number; number 0 changes nothing.

    Returns:
        The old cell of each new one (cells,), and the new digit of each old one, from 1 on (size,).
    """
    cells, digits = np.arange(size * size).reshape(size, size), np.arange(1, size + 1)
    if index == 0:
        return cells.ravel(), digits
    keys = random.fold(random.mix(index), np.arange(6))

    def order(n: int, purpose: int, groups: int = 1) -> NDArray[np.int64]:
        """Random orders of n things (groups, n)."""
        return random.uniform(random.bits(keys[purpose], groups * n)).reshape(groups, n).argsort(axis=1)

    def lines(group: int, purpose: int) -> NDArray[np.int64]:
        """An order of lines that keeps bands of so many together."""
        n = size // group
        return (order(n, purpose)[0][:, None] * group + order(group, purpose + 1, n)).ravel()

    height, width = BOXES[size]
    turned = cells[np.ix_(lines(height, 0), lines(width, 2))]
    flips = height == width and bool(random.bits(keys[4], 1)[0] & np.uint64(1))
    return (turned.T if flips else turned).ravel(), order(size, 5)[0] + 1


def is_solution(boards: Boards, size: int) -> NDArray[np.bool_]:
    """(n,) whether full boards (n, cells) hold every digit once in every row, column and box."""
    in_units = np.sort(boards[:, tables(size).units], axis=2)
    return (in_units == np.arange(1, size + 1)).all(axis=(1, 2))


def to_text(board: Boards) -> str:
    """A board as one line of digits, `.` for blank."""
    return "".join("." if d == 0 else str(d) for d in board.tolist())


def from_text(text: str) -> Boards | None:
    """The board of one line of digits, `.` or `0` for blank, or None where it is no board of any size."""
    size = SIZE_OF.get(len(text))
    if size is None or not set(text) <= set(".0123456789"[: size + 2]):
        return None
    return np.frombuffer(text.replace(".", "0").encode(), dtype=np.uint8) - np.uint8(ord("0"))
