"""The held-out rows that a training is judged by, and the scores of its weights on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from zoo.core.errors import UsageError, unknown
from zoo.models.ends import Ends
from zoo.objectives.base import Objective
from zoo.ops.common import logged_forms
from zoo.tasks.protocol import Batch, Task
from zoo.training.evaluation import Answers, answered, held_out, scalars, scored
from zoo.training.group import Group
from zoo.training.train_options import TrainConfig


class Scoring:
    """Scores of weights on validation and on test, and the order of the former.

    Attributes:
        validation: the rows, None where the task has none.
        selection: the figure of validation that selects the best weights.
        forms: of each op, as the last evaluation ran them.

    Raises:
        UsageError: a metric that the task's score does not have.
    """

    def __init__(
        self,
        task: Task,
        objective: Objective,
        config: TrainConfig,
        *,
        precision: str,
        stop: Callable[[], bool],
        group: Group,
    ):
        self.task, self.objective, self.config = task, objective, config
        self._precision, self._stop, self._group = precision, stop, group
        self.forms: dict[str, list[str]] = {}
        self.selection = config.selects_by(objective.metric)
        self.validation: Batch | None = None
        if "validation" in task.absent:
            for key in ("metric", "target"):
                if getattr(config, key) is not None:
                    told = f"{task.name} has no validation rows to measure it on"
                    raise UsageError(f"train.{key} is not allowed: {told}.")
            return
        self.validation = held_out(task, "validation", config.eval_rows)
        known = ["loss", *scalars(task.score(self.validation, self.validation.targets))]
        for metric in {self.selection, *([config.target.metric] if config.target else [])}:
            if metric not in known:
                raise unknown("metric", metric, known)

    def score(self, model: Ends, rows: Batch) -> dict[str, Any]:
        """The task's score of a model's answers."""
        return scored(self.objective, rows, self.answers(model, rows))

    def answers(self, model: Ends, rows: Batch) -> Answers:
        """A model's answers, those of all processes."""
        # Whole passes run uncompiled: their shapes differ, and each would be compiled anew.
        eagerly = torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext()
        size = self.config.eval_batch_size or self.config.batch_size
        with eagerly, logged_forms() as forms:
            how: dict[str, Any] = {
                "batch_size": size,
                "precision": self._precision,
                "stop": self._stop,
                "compile": self.config.compile,
            }
            answers = answered(model, self.objective, rows, **how, group=self._group)
        self.forms = {op: sorted(names) for op, names in sorted(forms.items())}
        return answers

    def rank(self, score: dict[str, Any]) -> list[float]:
        """What orders scores of validation: the best has the largest."""
        value = score[self.selection]
        return [-value if self.selection in self.task.lower_is_better else value, -score["loss"]]

    def reaches_target(self, score: dict[str, Any]) -> bool:
        """Whether a score of validation ends the training."""
        target = self.config.target
        return target is not None and target.reached_by(score, self.task.lower_is_better)

    def test_rows(self) -> Batch:
        """The rows of test, which are read once."""
        return held_out(self.task, "test", self.config.test_rows)


__all__ = ["Scoring"]
