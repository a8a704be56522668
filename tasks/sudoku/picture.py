"""A Sudoku as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zoo.tasks.sudoku.boards import BOXES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILLED, _WRONG = "#1f5fa8", "#c62828"


def draw_board(puzzle: NDArray[np.int64], answer: NDArray[np.int64], filled: NDArray[np.int64], size: int) -> Figure:
    """Givens bold, filled cells blue, wrong ones red with the right digit small beside; all boards (cells,)."""
    from matplotlib.figure import Figure

    height, width = BOXES[size]
    figure = Figure(figsize=(0.5 * size + 0.4, 0.5 * size + 0.4))
    axes = figure.add_axes((0.03, 0.03, 0.94, 0.94))
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    for i in range(size + 1):
        axes.plot([0, size], [i, i], color="black", linewidth=2 if i % height == 0 else 0.5)
        axes.plot([i, i], [0, size], color="black", linewidth=2 if i % width == 0 else 0.5)
    for cell in range(size * size):
        y, x = divmod(cell, size)
        given, shown, right = puzzle[cell] > 0, filled[cell], answer[cell]
        color = _WRONG if shown != right else "black" if given else _FILLED
        if shown != right:
            axes.fill_between([x, x + 1], y, y + 1, color=_WRONG, alpha=0.15, linewidth=0)
            axes.text(x + 0.86, y + 0.2, str(right), color="grey", fontsize=7, ha="center", va="center")
        text = "?" if shown == 0 else str(shown)
        weight = "bold" if given else "normal"
        axes.text(x + 0.5, y + 0.53, text, color=color, weight=weight, fontsize=16, ha="center", va="center")
    return figure
