"""Regression over series: real vectors predicted by their squared error."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.objectives.base import register
from zoo.objectives.series import SeriesObjective
from zoo.tasks.protocol import Task


@register("regression")
class Regression(SeriesObjective):
    """Predict real vectors at the scored steps of a series: mean squared error.

    The loss is the mean over the scored steps, and over the numbers of a step, of (output - target)^2; with `huber` of
    Huber's loss, which rises linearly beyond that distance. The score has `mse`, `trivial_mse` and `mse_ratio`, the
    error as a share of the one of the task's trivial predictor: 1 is no better than it, 0 is perfect. `mse` selects the
    best weights.

    A causal model predicts each step from the steps up to it. One with causal=False reads the whole row.
    """

    class Config(Options):
        """huber: distance from which on the loss is linear (and scaled so that it is the square below)."""

        huber: float | None = Field(default=None, gt=0)

    metric = "mse"
    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if not task.n_outputs:
            raise UsageError(
                f"regression predicts real vectors, and {task.name} asks for classes: set objective=classification."
            )

    def losses(self, outputs: Tensor, targets: Tensor, *, learning: bool) -> Tensor:
        off, bend = outputs - targets.to(outputs.dtype), self.config.huber
        squares = off.square()
        if bend is not None:
            squares = squares.where(off.abs() <= bend, bend * (2 * off.abs() - bend))
        return squares.mean(-1)

    def answers(self, outputs: Tensor) -> Tensor:
        return outputs
