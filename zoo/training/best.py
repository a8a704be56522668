"""The checkpoint of the best weights so far by validation, which may be damaged before it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.training import checkpoint
from zoo.training.group import Group
from zoo.training.session import Position


class BestWeights:
    """Where the best weights so far are, for a training that stands at a position."""

    def __init__(self, checkpoints: Path, at: Position, group: Group, say: Callable[[str], None]):
        self._checkpoints, self._at, self._group, self._say = checkpoints, at, group, say

    @property
    def path(self) -> Path:
        """Their checkpoint."""
        assert self._at.best is not None
        return self._checkpoints / checkpoint.name_of(self._at.best.step)

    def check(self, read: Callable[[Path], Any] = checkpoint.verify) -> bool:
        """Whether their checkpoint can be read; if it is damaged or gone, the best is chosen anew from here on."""

        def problem() -> str | None:
            try:
                read(self.path)
            except checkpoint.Damaged as error:
                return str(error).rstrip(".")
            return None

        found = self._group.told(problem)
        if found is None:
            return True
        at = self._at
        assert at.best is not None
        at.lost_best, at.best, at.to_evaluate = at.best.step, None, True
        lost = f"{checkpoint.name_of(at.lost_best)}, the best by validation so far, is lost"
        told = f"the best is chosen anew from step {at.step} on. To have it back, start over with --fresh"
        self._say(f"{found}: {lost}, and {told}.")
        return False


__all__ = ["BestWeights"]
