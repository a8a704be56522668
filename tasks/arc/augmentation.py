"""Augmentation: a puzzle under turns, flips and other colours is another puzzle of the same kind."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.tasks import random
from zoo.tasks.arc.grids import COLOURS, TURNS, Grid, Puzzle, turn, turn_back


class Augmentations(NamedTuple):
    """The maps of one puzzle; the first leaves it as it is, and no two do the same to its colours.

    Attributes:
        turns: (n,) int64, see `turn`.
        colours: (n, 10) uint8, the new colour of each; black stays.
    """

    turns: NDArray[np.int64]
    colours: NDArray[np.uint8]

    def apply(self, number: int, grid: Grid) -> Grid:
        """A grid under map `number`."""
        return turn(self.colours[number][grid], int(self.turns[number]))

    def undo(self, number: int, grid: Grid) -> Grid:
        """The grid before `apply`."""
        return np.argsort(self.colours[number]).astype(np.uint8)[turn_back(grid, int(self.turns[number]))]


def augmentations(puzzle: Puzzle, n: int) -> Augmentations:
    """At most `n` maps, drawn from the puzzle's name alone; fewer where its colours allow no more."""
    digest = hashlib.sha256(puzzle.name.encode()).digest()
    key = random.mix(int.from_bytes(digest[:8], "little"))
    used = np.unique(np.concatenate([grid.ravel() for pair in (*puzzle.train, *puzzle.test) for grid in pair]))
    used = used[used > 0]
    for tries in (n + n // 8, 5 * n):  # most puzzles need few more than they have
        words = random.bits(key, tries * COLOURS).reshape(tries, COLOURS)
        turns = random.below(words[:, 0], TURNS)
        colours = np.zeros((tries, COLOURS), dtype=np.uint8)
        colours[:, 1:] = np.argsort(words[:, 1:], axis=1, kind="stable") + 1
        turns[0], colours[0] = 0, np.arange(COLOURS)
        effects = turns + TURNS * (colours[:, used].astype(np.int64) @ COLOURS ** np.arange(len(used)))
        first = np.sort(np.unique(effects, return_index=True)[1])[:n]
        if len(first) == n:
            break
    return Augmentations(turns[first], colours[first])
