"""Grids as a figure and as cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from zoo.tasks.arc.grids import COLOURS, FIRST, Grid
from zoo.tasks.sketch import Cell, Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SQUARES = "⬛🟦🟥🟩🟨⬜🟪🟧🔵🟫"
"""Of each colour in a terminal, two columns wide."""
_PALETTE = (
    "#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25",
)  # fmt: skip


def cell(kind: Kind, token: int) -> Cell:
    """A cell of an answer in the making."""
    if kind == "hidden":
        return Cell(kind, "", "░░ ")
    if 0 <= token - FIRST < COLOURS and kind != "outside":
        return Cell(kind, "", f"{SQUARES[token - FIRST]} ", _PALETTE[token - FIRST])
    return Cell(kind if kind == "wrong" else "outside", "", "   ")


def draw_grids(grids: dict[str, Grid]) -> Figure:
    """Grids beside each other under their titles; cells of the third that differ from the second are crossed out."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(grids), 3.6), layout="constrained")
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    shown = list(grids.values())
    for ax, (title, grid) in zip(axes, grids.items(), strict=True):
        height, width = grid.shape
        ax.set_title(title, fontsize=11)
        ax.set_xticks([])
        ax.set_yticks([])
        if not grid.size:
            continue
        ax.imshow(grid, cmap=ListedColormap(_PALETTE), vmin=0, vmax=COLOURS - 1, interpolation="nearest")
        for x in range(1, width):
            ax.axvline(x - 0.5, color="#555555", linewidth=0.5)
        for y in range(1, height):
            ax.axhline(y - 0.5, color="#555555", linewidth=0.5)
    for y, x in np.ndindex(shown[2].shape) if len(shown) > 2 else ():
        right = shown[1]
        if y >= right.shape[0] or x >= right.shape[1] or shown[2][y, x] != right[y, x]:
            axes[2].plot(x, y, "X", color="white", markeredgecolor="black", markersize=7)
    return figure
