"""Callbacks that send a run's records to experiment trackers: `zoo train RECIPE --track wandb`."""

from __future__ import annotations

from collections.abc import Iterable

from zoo.core.errors import unknown
from zoo.training.tracking.base import Tracker
from zoo.training.tracking.mlflow import MLflow
from zoo.training.tracking.wandb import WandB

TRACKERS: dict[str, type[Tracker]] = {cls.package: cls for cls in (WandB, MLflow)}


def trackers(names: Iterable[str]) -> list[Tracker]:
    """The trackers of these names, each once, with the settings of their own environment variables.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
    return [TRACKERS[name]() for name in dict.fromkeys(names)]


__all__ = ["TRACKERS", "MLflow", "Tracker", "WandB", "trackers"]
