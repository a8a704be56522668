"""Which trials go on: all of them, or those that asynchronous successive halving (ASHA) lets."""

from __future__ import annotations

import importlib.util
import json
from typing import Any, NamedTuple

from zoo.core.errors import UsageError
from zoo.sweeps.plan import Plan
from zoo.tasks.scores import LOWER_IS_BETTER


class Rules(NamedTuple):
    """What a judge has to know, as it is sent to the process that it works in.

    Attributes:
        metric: the validation figure that trials are measured by.
        grace: steps before which no trial is ended.
        steps: of a whole training.
        reduction: see `zoo.sweeps.search.Search`.
    """

    metric: str
    grace: int
    steps: int
    reduction: float


class Judge:
    """Ray Tune's ASHA over the validation records of trials; without rules every trial goes on.

    Args:
        rules: how it judges.
        groups: by trial, the name of those that are measured against each other; a trial that is missing goes on.
    """

    def __init__(self, rules: Rules | None = None, groups: dict[int, str] | None = None):
        self.rules, self.groups = rules, groups or {}
        self._schedulers: dict[str, Any] = {}
        self._known: set[int] = set()
        self.latest: dict[int, dict[str, Any]] = {}
        """The newest record of each trial."""

    def __call__(self, trial: int, record: dict[str, Any]) -> bool:
        """Whether a trial ends with this validation record."""
        self.latest[trial] = record
        if self.rules is None or trial not in self.groups:
            return False
        rules, scheduler = self.rules, self._scheduler(self.groups[trial])
        named = _Named(str(trial))
        if trial not in self._known:
            self._known.add(trial)
            scheduler.on_trial_add(None, named)
        figure = -record[rules.metric] if rules.metric in LOWER_IS_BETTER else record[rules.metric]
        return scheduler.on_trial_result(None, named, {"step": record["step"], "figure": figure}) == "STOP"

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


def judged(plan: Plan) -> tuple[Rules | None, dict[int, str]]:
    """How the trials of a plan are judged: the arguments of `Judge`.

    Raises:
        UsageError: there is no Ray, whose scheduler is needed, or trials that cannot be measured against each other.
    """
    search = plan.config.search
    if search.name != "asha":
        return None, {}
    if importlib.util.find_spec("ray") is None:
        raise UsageError("search=asha needs Ray, which is not installed: pip install sequence-zoo[sweep].")
    for key in search.by:
        if key not in plan.keys:
            raise UsageError(f"sweep.search: by={key!r} is no swept key. Swept: {', '.join(plan.keys) or 'none'}.")
    trains = [trial.config["train"] for trial in plan.trials]
    metrics = {train["metric"] or (train["target"] or {}).get("metric", "accuracy") for train in trains}
    if len(metrics) > 1:
        raise UsageError(f"search=asha measures all trials by one figure, not by {' and '.join(sorted(metrics))}.")
    steps = max(train["steps"] for train in trains)
    grace = search.grace or max(train["eval_every"] for train in trains)
    if grace >= steps:
        raise UsageError(f"sweep.search: grace={grace} is no less than train.steps={steps}: no trial would be ended.")
    groups = {trial.number: json.dumps([trial.point[key] for key in search.by]) for trial in plan.trials}
    return Rules(metrics.pop(), grace, steps, search.reduction), groups


__all__ = ["Judge", "Rules", "judged"]
