"""Points as characters, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Points = tuple[NDArray[np.float64], NDArray[np.float64]]


def chart(points: Mapping[str, Points], width: int = 72, height: int = 9) -> list[str]:
    """Lines of a chart with an axis on the left.

    Args:
        points: by their mark, (x, y) of each kind; a cell with marks of the last two kinds shows `#`.
        width: columns.
        height: lines.
    """
    xs, ys = (np.concatenate([p[i] for p in points.values()]) for i in (0, 1))
    ys = ys[np.isfinite(ys)]
    left, right = float(xs.min()), float(xs.max())
    low, high = (float(ys.min()), float(ys.max())) if len(ys) else (0.0, 1.0)
    cells = [[" "] * width for _ in range(height)]
    for mark, (x, y) in points.items():
        columns = np.round((x - left) / max(right - left, 1e-12) * (width - 1)).astype(int)
        rises = np.round((np.nan_to_num(y) - low) / max(high - low, 1e-12) * (height - 1)).clip(0, height - 1)
        for column, rise in zip(columns, rises.astype(int), strict=True):
            cell = cells[height - 1 - rise]
            cell[column] = "#" if cell[column] not in (" ", mark, "o") and mark == "+" else mark
    labels = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    return [f"{labels.get(i, ''):>7} |{''.join(line)}".rstrip() for i, line in enumerate(cells)]
