"""Rows of a task as tensors, and how they are cut and picked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORE = -100
"""The target where nothing is scored (the `ignore_index` of torch's cross entropy)."""


class Batch(NamedTuple):
    """`n` rows of a task. All tensors have the row first.

    Attributes:
        inputs: (n, L) int64 token ids; under the layout `series` (n, L, D_in) real vectors.
        targets: (n, L) int64 token ids, `IGNORE` where nothing is scored. Under the layout `next_token` the target at
            position t is what the model should predict having read inputs up to t; under `fill_in` it is the
            content of cell t. Under `series`, classes (n, L) int64 with `IGNORE`, a class of a whole row at its last
            step; or real vectors (n, L, D_out), which are scored where `mask` says so.
        slices: figures of each row by which scores are split, each (n,): number of pairs, clues, path length.
        timespans: (n, L) time since the previous token, for tasks with irregular times.
        puzzles: (n,) int64 numbers, below the task's `n_puzzles`, of the puzzles that rows belong to, for models that
            learn something of each.
        streams: (n,) int64 names of the rows' own random streams, for what is drawn while they are answered; where
            there are none, their content names them.
        lengths: (n,) int64 steps of each row, for series whose rows differ in length; what follows is padding.
        mask: (n, L) bool, the steps that are scored, where targets are real vectors.
    """

    inputs: Tensor
    targets: Tensor
    slices: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    timespans: Tensor | None = None
    puzzles: Tensor | None = None
    streams: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None

    @property
    def scored(self) -> Tensor:
        """(n, L) bool, the positions that are scored."""
        return self.targets != IGNORE if self.mask is None else self.mask


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """A batch cut into batches of `size` rows, the last one shorter."""
    return [take(batch, slice(i, i + size)) for i in range(0, len(batch.inputs), size)]


def take(batch: Batch, rows: slice | Tensor) -> Batch:
    """The rows that an index picks."""
    slices = {k: v[rows] for k, v in batch.slices.items()}
    inputs, targets, _, *rest = batch
    return Batch(inputs[rows], targets[rows], slices, *(None if t is None else t[rows] for t in rest))
