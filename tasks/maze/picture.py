"""A maze as text, as a figure and as cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zoo.tasks.maze.grids import GOAL, OPEN, PATH, START, WALL
from zoo.tasks.sketch import Cell, Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLACK, _WHITE, _BLUE, _RED, _PALE = (
    (0.13, 0.13, 0.15),
    (1, 1, 1),
    (0.36, 0.62, 0.9),
    (0.85, 0.25, 0.2),
    (0.78, 0.87, 0.97),
)
INK = {0: "??", WALL: "██", OPEN: "  ", START: "S ", GOAL: "G ", PATH: "· "}
"""Of each token in a terminal, two columns wide."""
_FILLS = {WALL: "#2b2e36", OPEN: "#ffffff", START: "#bfe3d5", GOAL: "#ffd9a0", PATH: "#7cc0ee"}
_GREEN, _AMBER = (0.35, 0.75, 0.4), (0.98, 0.7, 0.25)


def cell(kind: Kind, token: int) -> Cell:
    """A cell of an answer in the making."""
    if kind == "hidden":
        return Cell(kind, "", "░░")
    letter = INK.get(token, "??")[0] if token in (START, GOAL) else ""
    return Cell(kind, letter, INK.get(token, "??"), _FILLS.get(token, "#dddddd"))


def draw_maze(answer: NDArray[np.int64], predicted: NDArray[np.int64] | None, verdict: str, valid: bool) -> Figure:
    """Walls black and the path blue; of a prediction, path cells it misses pale, other cells that differ red.

    Both are (height, width) tokens. The cells of another valid path are blue, too.
    """
    from matplotlib.figure import Figure

    height, width = answer.shape
    picture = np.full((height, width, 3), _WHITE, dtype=float)
    picture[answer == WALL] = _BLACK
    if predicted is None:
        picture[answer == PATH] = _BLUE
    else:
        picture[predicted != answer] = _BLUE if valid else _RED
        picture[(predicted != answer) & (answer == PATH)] = _PALE
        picture[(predicted == answer) & (answer == PATH)] = _BLUE
    scale = 6 / max(height, width)
    figure = Figure(figsize=(width * scale, height * scale + 0.6), layout="constrained")
    axes = figure.add_subplot()
    picture[answer == START], picture[answer == GOAL] = _GREEN, _AMBER
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for token, letter in ((START, "S"), (GOAL, "G")):
        for y, x in np.argwhere(answer == token):
            axes.text(x, y, letter, ha="center", va="center", weight="bold", fontsize=min(16, 50 * scale))
    if predicted is not None:
        axes.set_title(verdict, fontsize=11)
        axes.set_xlabel("blue: path, pale: path of the answer that is missing, red: wrong", fontsize=8)
    return figure
