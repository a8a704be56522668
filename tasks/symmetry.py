"""Symmetries of a task: maps of its problems onto others that are as hard, whose answers they map too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Symmetry(NamedTuple):
    """One map of a row of L cells of V tokens.

    Attributes:
        cells: (L,) int64, the old cell of each new one.
        tokens: (V,) int64, the new token of each old one.
    """

    cells: Tensor
    tokens: Tensor

    def turn(self, rows: Tensor) -> Tensor:
        """Rows (n, L) of tokens under the map."""
        return self.tokens.to(rows.device)[rows[:, self.cells]]

    def turn_back(self, logits: Tensor) -> Tensor:
        """Logits (n, L, V) of the rows from those of the rows under the map."""
        new = torch.empty_like(logits)
        new[:, self.cells] = logits[..., self.tokens.to(logits.device)]
        return new


__all__ = ["Symmetry"]
