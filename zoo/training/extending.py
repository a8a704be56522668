"""A run that goes on under a changed length: more steps, other rows, another target.

The schedule follows from `train.steps` and the step alone. From the step of the change on, the learning rate is that of
a run that had the new number of steps from its start: `constant` stays, `cosine` and `wsd` are stretched, so that a
run that had come to the end of its schedule returns to a higher rate, the more steps are added the higher. With
`constant`, the run has the same bits as one that had all steps from its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from zoo.core.errors import UsageError
from zoo.training.optimizer import lr_scale
from zoo.training.result import has_more_time
from zoo.training.train_options import TrainConfig

STEPS, ROWS, TARGET, METRIC = "train.steps", "train.rows", "train.target", "train.metric"


class Extension(BaseModel):
    """A change of a run's length.

    Attributes:
        step: the number of steps that were done before it.
        changes: for each changed key the old and the new value.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    step: NonNegativeInt
    changes: dict[str, list[Any]]


def extends(key: str) -> bool:
    """Whether a key of a run's config may change when the run goes on."""
    return key in (STEPS, ROWS, METRIC) or key == TARGET or key.startswith(f"{TARGET}.")


def check(
    path: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    done: int,
    result: Mapping[str, Any],
    default: str = "accuracy",
) -> None:
    """Refuse changes of a run's length that cannot be made.

    Args:
        path: the run folder.
        old: the section `train` that the run was trained with.
        new: the section `train` with which it is to continue.
        done: number of steps that are done.
        result: what result.json holds.
        default: the figure that selects the best weights where neither says which (`Objective.metric`).

    Raises:
        UsageError: fewer steps than are done, a run that its target or its time ended, or weights that were chosen by
            another metric.
    """
    before, after = TrainConfig(**old), TrainConfig(**new)
    status = result.get("status")
    if after.steps < done:
        told = "choose at least as many, another folder with out=..., or start over with --fresh"
        raise UsageError(f"{path} has trained {done} steps, more than train.steps={after.steps}: {told}.")
    chosen, wanted = before.selects_by(default), after.selects_by(default)
    if chosen != wanted:
        told = f"{path} chose its best weights by {chosen}, and would go on with {wanted}"
        raise UsageError(f"{told}: give train.metric={chosen} too.")
    if status == "target" and before.target == after.target:
        told = "train.target=null goes on without a target, train.target.value=... to another"
        raise UsageError(f"{path} reached its train.target at step {done}: {told}.")
    if status == "time_budget" and not has_more_time(after, result):
        told = f"its train.time_budget={after.time_budget:g} is over: train.time_budget=null sets no limit"
        raise UsageError(f"{path} ended at step {done} because {told}.")
    if status == "finished" and after.steps == before.steps:
        raise UsageError(f"{path} has done all its {done} steps: to go on, give a larger train.steps too.")


def schedule(config: TrainConfig, step: int, steps_before: int) -> str:
    """How the learning rate goes on after `step` steps of a run that was to have `steps_before`, in one line."""
    told = f"train.steps was {steps_before} and is {config.steps} from step {step} on"
    if config.schedule == "constant":
        return f"{told}: the schedule is constant, as if the run had had all steps from its start."
    last = config.lr * lr_scale(config.model_copy(update={"steps": steps_before}), max(step - 1, 0))
    now = config.lr * lr_scale(config, step)
    rates = f"the learning rate goes on with {now:.3g}, after {last:.3g} in the last step"
    return f"{told}: the {config.schedule} schedule is that of {config.steps} steps, so {rates}."


__all__ = ["STEPS", "Extension", "check", "extends", "schedule"]
