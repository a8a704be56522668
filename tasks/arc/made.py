"""Small made puzzles, for trials: a few families of simple rules. They are not ARC's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zoo.tasks import random
from zoo.tasks.arc.grids import Grid, Pair, Puzzle

SMALLEST = 6
"""The least `size`: some rules double a grid of 3 x 3."""
_DEMONSTRATIONS = 3
_SALT = 0xA5C

Rule = Callable[[Grid], Grid]
Canvas = Callable[["Dice", int, list[int]], Grid]


class Dice:
    """Random numbers of one key, one after the other."""

    def __init__(self, key: random.Keys):
        self._key, self._drawn = key, 0

    def below(self, bound: int, count: int) -> np.ndarray:
        """(count,) integers in [0, bound)."""
        self._drawn += 1
        return random.below(random.bits(random.fold(self._key, self._drawn), count)[0], bound)

    def one(self, low: int, high: int) -> int:
        """An integer from low to high."""
        return low + int(self.below(high - low + 1, 1)[0])

    def colours(self, count: int) -> list[int]:
        """Different colours, none of them black."""
        self._drawn += 1
        return (1 + random.distinct(random.fold(self._key, self._drawn), count, 9)[0]).tolist()


def _scattered(dice: Dice, side: int, colours: list[int]) -> Grid:
    """Half black, half scattered colours."""
    height, width = dice.one(3, side), dice.one(3, side)
    palette = np.array([0] * len(colours) + colours, dtype=np.uint8)
    return palette[dice.below(len(palette), height * width)].reshape(height, width)


def _blocks(dice: Dice, side: int, colours: list[int]) -> Grid:
    """Two filled rectangles on black."""
    height, width = dice.one(5, side), dice.one(5, side)
    grid = np.zeros((height, width), dtype=np.uint8)
    for colour in colours[:2]:
        y, x = dice.one(0, height - 3), dice.one(0, width - 3)
        grid[y : y + dice.one(3, 5), x : x + dice.one(3, 5)] = colour
    return grid


def _fallen(grid: Grid) -> Grid:
    order = np.argsort(grid != 0, axis=0, kind="stable")
    return np.take_along_axis(grid, order, axis=0)


def _streaked(grid: Grid) -> Grid:
    first = np.take_along_axis(grid, (grid != 0).argmax(1)[:, None], axis=1)
    return np.where(grid == 0, first, grid)


def _bounded(grid: Grid) -> Grid:
    rows, columns = np.flatnonzero(grid.any(1)), np.flatnonzero(grid.any(0))
    return grid[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else grid


def _recoloured(pairs: dict[int, int]) -> Rule:
    table = np.array([pairs.get(colour, colour) for colour in range(10)], dtype=np.uint8)
    return lambda grid: table[grid]


def _framed(colour: int) -> Rule:
    def rule(grid: Grid) -> Grid:
        answer = np.full_like(grid, colour)
        answer[1:-1, 1:-1] = grid[1:-1, 1:-1]
        return answer

    return rule


def _filled(colour: int) -> Rule:
    def rule(grid: Grid) -> Grid:
        p = np.pad(grid, 1)
        inside = (grid != 0) & (p[2:, 1:-1] != 0) & (p[:-2, 1:-1] != 0) & (p[1:-1, 2:] != 0) & (p[1:-1, :-2] != 0)
        return np.where(inside, np.uint8(colour), grid)

    return rule


def _towards(rule: Rule, quarters: int) -> Rule:
    return lambda grid: np.rot90(rule(np.rot90(grid, quarters)), -quarters)


FAMILIES: dict[str, Callable[[Dice, list[int]], tuple[Canvas, Rule, bool]]] = {
    "swap": lambda dice, c: (_scattered, _recoloured({c[0]: c[1], c[1]: c[0]}), False),
    "erase": lambda dice, c: (_scattered, _recoloured({c[0]: 0}), False),
    "flip": lambda dice, c: (_scattered, lambda grid, axis=dice.one(0, 1): np.flip(grid, axis), False),
    "turn": lambda dice, c: (_scattered, lambda grid, k=dice.one(1, 3): np.rot90(grid, k), False),
    "gravity": lambda dice, c: (_scattered, _towards(_fallen, dice.one(0, 3)), False),
    "streaks": lambda dice, c: (_scattered, _towards(_streaked, dice.one(0, 3)), False),
    "frame": lambda dice, c: (_scattered, _framed(c[3]), False),
    "inside": lambda dice, c: (_blocks, _filled(c[3]), False),
    "crop": lambda dice, c: (_blocks, _bounded, False),
    "enlarge": lambda dice, c: (_scattered, lambda grid: np.kron(grid, np.ones((2, 2), np.uint8)), True),
    "reflect": lambda dice, c: (
        _scattered,
        lambda grid, axis=dice.one(0, 1): np.concatenate([grid, np.flip(grid, axis)], axis),
        True,
    ),
}
"""By name: of a puzzle's dice and four colours, what its questions look like, its rule, and whether that doubles."""


def made_puzzles(start: int, n: int, size: int) -> list[Puzzle]:
    """Made puzzles start ... start + n - 1, always the same, with grids of 3 to `size` cells on a side."""
    return [_made(number, size) for number in range(start, start + n)]


def _made(number: int, size: int) -> Puzzle:
    dice = Dice(random.fold(random.mix(_SALT), number))
    family = list(FAMILIES)[number % len(FAMILIES)]
    colours = dice.colours(4)
    canvas, rule, doubles = FAMILIES[family](dice, colours)
    wanted = _DEMONSTRATIONS + dice.one(1, 2)
    pairs: list[Pair] = []
    seen = set()
    while len(pairs) < wanted:
        question = canvas(dice, size // 2 if doubles else size, colours[:3])
        if (question.shape, question.tobytes()) not in seen:
            seen.add((question.shape, question.tobytes()))
            pairs.append(Pair(question, np.ascontiguousarray(rule(question))))
    return Puzzle(f"{family}-{number}", tuple(pairs[:_DEMONSTRATIONS]), tuple(pairs[_DEMONSTRATIONS:]))
