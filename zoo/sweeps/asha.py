"""How the trials of a plan are judged, and what is known of those that ran before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.core.errors import UsageError
from zoo.core.run_files import read_metrics
from zoo.sweeps.judge import Rules, has_ray
from zoo.sweeps.plan import Plan
from zoo.sweeps.store import Store
from zoo.tasks.scores import LOWER_IS_BETTER


def judged(plan: Plan) -> tuple[Rules | None, dict[int, str]]:
    """How the trials of a plan are judged: the arguments of `Judge`.

    Raises:
        UsageError: there is no Ray, whose scheduler is needed, or trials that cannot be measured against each other.
    """
    search = plan.config.search
    if search.name != "asha":
        return None, {}
    if not has_ray():
        raise UsageError("search=asha needs Ray, which is not installed: pip install sequence-zoo[sweep].")
    for key in search.by:
        if key not in plan.keys:
            raise UsageError(f"sweep.search: by={key!r} is no swept key. Swept: {', '.join(plan.keys) or 'none'}.")
    trains = [trial.config["train"] for trial in plan.trials]
    metrics = {trial.metric for trial in plan.trials}
    if len(metrics) > 1:
        raise UsageError(f"search=asha measures all trials by one figure, not by {' and '.join(sorted(metrics))}.")
    steps = max(train["steps"] for train in trains)
    grace = search.grace or max(train["eval_every"] for train in trains)
    if grace >= steps:
        raise UsageError(f"sweep.search: grace={grace} is no less than train.steps={steps}: no trial would be ended.")
    groups = {trial.number: json.dumps([trial.point[key] for key in search.by]) for trial in plan.trials}
    metric = metrics.pop()
    return Rules(metric, metric in LOWER_IS_BETTER, grace, steps, search.reduction), groups


def history_of(plan: Plan, store: Store, trials: Path) -> list[tuple[int, dict[str, Any]]]:
    """The validation records of the trials of a plan that began before.

    Args:
        plan: the plan.
        store: of the sweep.
        trials: the folder of the trials' run folders, for those of which the store has no curve yet.
    """
    if not store.folder.is_dir():
        return []
    curves = store.curves().filter(split="validation").rows(named=True)
    found = [(row["trial"], {k: v for k, v in row.items() if k != "trial" and v is not None}) for row in curves]
    known = {trial for trial, _ in found}
    for trial in plan.trials:
        if trial.number not in known:
            lines = read_metrics(trials / trial.id)
            found += [(trial.number, line) for line in lines if line.get("split") == "validation"]
    return found


__all__ = ["history_of", "judged"]
