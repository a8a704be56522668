"""What a training leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.models.ends import Ends
from zoo.training.loading import load
from zoo.training.train_options import TrainConfig

ENDED = ("finished", "target", "time_budget")
"""How a training ends by itself."""


class Result(NamedTuple):
    """What a training leaves: its folder, how it ended, and all figures of `result.json`."""

    path: Path
    status: str
    data: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """`{"validation": {...}, "test": {...}}` of the best weights."""
        return {split: self.data[split] for split in ("validation", "test")}

    def load(self) -> Ends:
        """The model with its best weights."""
        return load(self.path)


def has_more_time(config: TrainConfig, result: Mapping[str, Any]) -> bool:
    """Whether a run that ran out of time, by its status and seconds, has been given more."""
    budget = config.time_budget
    return result["status"] == "time_budget" and (budget is None or budget > result["seconds"])


def has_ended(result: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether a result is that of a run that has ended under this config, with nothing left to do."""
    if result["status"] not in ENDED or has_more_time(config, result):
        return False
    then, now = result.get("train"), config.model_dump(mode="json")
    return not isinstance(then, Mapping) or all(then.get(k, now[k]) == now[k] for k in ("steps", "rows", "target"))
