"""Classification over series: a class for a row or for a step, by cross entropy."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.objectives.base import register
from zoo.objectives.series import SeriesObjective
from zoo.tasks.protocol import Task


@register("classification")
class Classification(SeriesObjective):
    """Predict a class at the scored steps of a series: cross entropy.

    A class of a whole row is predicted at the row's last step, where a causal model has read all of it. The score has
    `accuracy` (averaged per row) and `exact` (rows with every scored step right).
    """

    class Config(Options):
        """label_smoothing: weight of the uniform distribution in the targets."""

        label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if not task.n_classes:
            raise UsageError(
                f"classification predicts classes, and {task.name} asks for real vectors: set objective=regression."
            )

    def losses(self, outputs: Tensor, targets: Tensor, *, learning: bool) -> Tensor:
        smoothing = self.config.label_smoothing if learning else 0.0
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing, reduction="none")

    def answers(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)
