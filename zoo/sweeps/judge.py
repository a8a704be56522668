"""Which trials go on: all of them, or those that asynchronous successive halving (ASHA) lets.

This module imports little, as it is also loaded by a process of Ray's that does nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

History = Sequence[tuple[int, dict[str, Any]]]
"""Trials, and validation records of theirs."""


def has_ray() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


class Rules(NamedTuple):
    """What a judge has to know, as it is sent to the process that it works in.

    Attributes:
        metric: the validation figure that trials are measured by.
        lower: whether that figure is the better the lower it is.
        grace: steps before which no trial is ended.
        steps: of a whole training.
        reduction: see `zoo.sweeps.search.Search`.
    """

    metric: str
    lower: bool
    grace: int
    steps: int
    reduction: float


class Judge:
    """Ray Tune's ASHA over the validation records of trials; without rules every trial goes on.

    Args:
        rules: how it judges.
        groups: by trial, the name of those that are measured against each other; a trial that is missing goes on.
        history: the validation records of trials that ran before.
    """

    def __init__(self, rules: Rules | None = None, groups: dict[int, str] | None = None, history: History = ()):
        self.rules, self.groups = rules, groups or {}
        self._schedulers: dict[str, Any] = {}
        self._known: set[int] = set()
        self._latest: dict[int, dict[str, Any]] = {}
        for trial, record in history:
            self.evaluated(trial, record)

    def evaluated(self, trial: int, record: dict[str, Any]) -> bool:
        """Whether a trial ends with this validation record."""
        self._latest[trial] = record
        if self.rules is None or trial not in self.groups:
            return False
        rules, scheduler = self.rules, self._scheduler(self.groups[trial])
        named = _Named(str(trial))
        if trial not in self._known:
            self._known.add(trial)
            scheduler.on_trial_add(None, named)
        figure = -record[rules.metric] if rules.lower else record[rules.metric]
        return scheduler.on_trial_result(None, named, {"step": record["step"], "figure": figure}) == "STOP"

    def latest(self) -> dict[int, dict[str, Any]]:
        """The newest record of each trial."""
        return self._latest

    def _scheduler(self, group: str) -> Any:
        if group not in self._schedulers:
            from ray.tune.schedulers import AsyncHyperBandScheduler

            assert self.rules is not None
            self._schedulers[group] = AsyncHyperBandScheduler(
                time_attr="step",
                metric="figure",
                mode="max",
                max_t=self.rules.steps,
                grace_period=self.rules.grace,
                reduction_factor=self.rules.reduction,
                stop_last_trials=False,
            )
        return self._schedulers[group]


class _Named(NamedTuple):
    """What the scheduler reads of a trial."""

    trial_id: str


__all__ = ["History", "Judge", "Rules", "has_ray"]
