"""Mazes as arrays of tokens (n, height * width): text, symmetries, shortest paths."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.core.errors import UsageError
from zoo.tasks import random

Grids = NDArray[np.uint8]

CHARACTERS = "# SGo"
"""Wall, open, start, goal, path: the tokens 1 to 5; 0 is padding."""
WALL, OPEN, START, GOAL, PATH = range(1, len(CHARACTERS) + 1)


@cache
def symmetries(height: int, width: int) -> NDArray[np.int64]:
    """(8, cells), or (4, cells) unless square: the turns and flips of a grid, as the old cell of each new one."""
    cells = np.arange(height * width).reshape(height, width)
    maps = [cells, cells[::-1], cells[:, ::-1], cells[::-1, ::-1]]
    if height == width:
        maps += [m.T for m in maps]
    return np.stack([m.ravel() for m in maps])


def solve(grids: ArrayLike, height: int, width: int) -> tuple[Grids, NDArray[np.int64]]:
    """A shortest path of each maze (n, cells): the mazes with it drawn in, and its number of steps (n,).

    A maze without a path, or without one start and one goal, comes back as it is, with the length -1.
    """
    from zoo.tasks.kernels import maze as kernels

    mazes = as_grids(grids, height, width)
    answers, lengths = np.empty_like(mazes), np.empty(len(mazes), dtype=np.int64)
    kernels.solve(mazes, height, width, answers, lengths)
    return answers, lengths


def is_valid(grids: ArrayLike, proposals: ArrayLike, height: int, width: int) -> NDArray[np.bool_]:
    """(n,) whether each proposal (n, cells) is its maze with one shortest path, whichever, and nothing else changed."""
    from zoo.tasks.kernels import maze as kernels

    mazes, drawn = as_grids(grids, height, width), as_grids(proposals, height, width)
    result = np.empty(len(mazes), dtype=np.bool_)
    kernels.valid(mazes, drawn, height, width, result)
    return result


def is_path(grids: ArrayLike, proposals: ArrayLike, height: int, width: int) -> NDArray[np.bool_]:
    """(n,) whether each proposal (n, cells) is its maze with one path, short or long, and nothing else changed.

    The path neither branches nor touches itself.
    """
    from zoo.tasks.kernels import maze as kernels

    mazes, drawn = as_grids(grids, height, width), as_grids(proposals, height, width)
    result = np.empty(len(mazes), dtype=np.bool_)
    kernels.paths(mazes, drawn, height, width, result)
    return result


def fingerprint(grids: ArrayLike, height: int, width: int) -> random.Keys:
    """(n,) a hash of each maze that no turn or flip changes, nor swapping start and goal."""
    from zoo.tasks.kernels import maze as kernels

    mazes = as_grids(grids, height, width)
    result = np.empty(len(mazes), dtype=np.uint64)
    kernels.fingerprints(mazes, symmetries(height, width), result)
    return result


def as_grids(grids: ArrayLike, height: int, width: int) -> Grids:
    """Mazes as (n, cells) uint8; tokens out of range become 0, padding."""
    mazes = np.asarray(grids)
    if mazes.ndim != 2 or mazes.shape[1] != height * width:
        raise UsageError(f"maze: mazes of {height}x{width} come as (n, {height * width}), not {mazes.shape}.")
    return np.ascontiguousarray(np.where((mazes > 0) & (mazes <= PATH), mazes, 0), dtype=np.uint8)


def to_text(grid: Grids) -> str:
    """A maze as one line of the public text form."""
    return "".join(CHARACTERS[token - 1] for token in grid.tolist())
