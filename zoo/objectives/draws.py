"""Random numbers that belong to rows: a row draws the same ones alone, in any batch and beside any others."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from zoo.objectives.base import Encoded
from zoo.tasks import random
from zoo.tasks.protocol import names_of


class RowDraws:
    """Random numbers for n rows, each from a stream of its own; hashes of a row's name, a purpose and a counter.

    Args:
        names: (n,) int64, the rows' streams.
    """

    def __init__(self, names: Tensor):
        self.keys: random.Keys = names.cpu().numpy().view(np.uint64)

    @classmethod
    def of(cls, data: Encoded) -> RowDraws:
        """Those of encoded rows, by their names, or by their content where they have none."""
        return cls(row_names(data))

    @classmethod
    def drawn(cls, n: int, generator: torch.Generator | None) -> RowDraws:
        """Those of n rows whose i-th stream is named by the i-th number of a generator."""
        return cls(torch.randint(2**63 - 1, (n,), generator=generator))

    def at(self, rows: Tensor | None, moment: Tensor | int) -> RowDraws:
        """Those of some rows (m,), of all by default, at a moment of each (m,): those of two have nothing in common."""
        keys = self.keys if rows is None else self.keys[rows.cpu().numpy()]
        counter = moment.cpu().numpy() if isinstance(moment, Tensor) else moment
        return RowDraws(names_of(random.fold(keys, counter)))

    def uniform(self, purpose: int, *shape: int) -> Tensor:
        """Numbers in the open interval (0, 1), (n, *shape) float64 on the CPU; others for any other purpose."""
        numbers = random.uniform(random.bits(random.fold(self.keys, purpose), math.prod(shape)))
        return torch.from_numpy(numbers).view(len(self.keys), *shape)

    def normal(self, purpose: int, *shape: int) -> Tensor:
        """Standard normal numbers, (n, *shape) float64 on the CPU; others for any other purpose."""
        return torch.special.ndtri(self.uniform(purpose, *shape))


def row_names(data: Encoded) -> Tensor:
    """(n,) the names of encoded rows: their own, or else of their content; further copies of a row have others."""
    if data.streams is not None and len(data.streams) == len(data.tokens):
        return data.streams
    keys = random.contents(data.tokens.cpu().numpy())
    order = np.argsort(keys, kind="stable")
    is_first = np.concatenate([[True], np.diff(keys[order]) != 0])[: len(keys)]
    copies = np.empty(len(keys), dtype=np.int64)
    places = np.arange(len(keys))
    copies[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return names_of(random.fold(keys, copies))


__all__ = ["RowDraws", "row_names"]
