"""What a sweep asks of a training that it starts, beside what every training leaves in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Pruned(Exception):
    """A training that is ended before its time, as others do better."""


class Watch:
    """Follows one training.

    Attributes:
        reads_test: whether the test rows are read at the end.
        keeps_rows: whether what comes out for each of them is kept.
        rows: if so, once they were read: for every row its `problem` and its figures, each a list.
    """

    reads_test: bool = True
    keeps_rows: bool = False
    rows: dict[str, list[Any]] | None = None

    def stops(self) -> bool:
        """Whether the training should save a checkpoint and end; read between two batches."""
        return False

    def evaluated(self, record: Mapping[str, Any]) -> bool:
        """Called with each validation record; whether the training ends here, with the status "pruned"."""
        return False


__all__ = ["Pruned", "Watch"]
